from __future__ import annotations

import stat
from pathlib import Path

import pytest

from wdmoe.runtime.errors import KeyFileError
from wdmoe.runtime.keys import decode_token, make_key, new_token, read_key, read_public_key, write_private


def test_a_key_survives_write_and_read_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    made = make_key(tmp_path / "keys" / "bs.key")
    assert read_key(tmp_path / "keys" / "bs.key") == made
    assert stat.S_IMODE((tmp_path / "keys" / "bs.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["bs.key"]
    assert made.secret not in repr(made)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    made = make_key(tmp_path / "bs.key")
    with pytest.raises(KeyFileError, match="it is not overwritten"):
        make_key(tmp_path / "bs.key")
    assert read_key(tmp_path / "bs.key") == made


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    make_key(tmp_path / "bs.key")
    (tmp_path / "bs.key").chmod(mode)
    with pytest.raises(KeyFileError, match=r"lets others read the secret key; run: chmod 600 .*bs\.key"):
        read_key(tmp_path / "bs.key")


@pytest.mark.parametrize("text", ["", "x", "a\nb\n", "\n" * 3])
def test_a_damaged_key_is_refused(tmp_path: Path, text: str) -> None:
    write_private(tmp_path / "bs.key", text)
    with pytest.raises(KeyFileError, match="halves do not belong together"):
        read_key(tmp_path / "bs.key")
    with pytest.raises(KeyFileError, match="damaged"):
        read_public_key(tmp_path / "bs.key")


def test_halves_of_two_keys_are_refused(tmp_path: Path) -> None:
    one, two = make_key(tmp_path / "one"), make_key(tmp_path / "two")
    write_private(tmp_path / "mixed", f"{one.public}\n{two.secret}\n")
    with pytest.raises(KeyFileError, match="halves do not belong together"):
        read_key(tmp_path / "mixed")


def test_a_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="wdmoe-bs keygen"):
        read_key(tmp_path / "bs.key")
    with pytest.raises(KeyFileError, match="--enrol TOKEN"):
        read_public_key(tmp_path / "device-0.bs")


def test_a_token_survives_a_copy_and_paste_and_hides_its_secret(tmp_path: Path) -> None:
    token = new_token(make_key(tmp_path / "bs.key").public)
    assert decode_token(f"  {token.encode()}\n") == token
    assert repr(token.secret) not in repr(token)
    assert new_token(token.bs_public).secret != token.secret


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-4], lambda t: t[7:], lambda t: "", lambda t: t + "!", lambda t: t[:30]]
)
def test_half_a_token_is_refused(tmp_path: Path, damage: object) -> None:
    text = new_token(make_key(tmp_path / "bs.key").public).encode()
    with pytest.raises(ValueError, match="copy the whole line"):
        decode_token(damage(text))  # type: ignore[operator]
