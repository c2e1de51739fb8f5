from __future__ import annotations

from pathlib import Path

import pytest

from wdmoe.bs.roster import FileRoster
from wdmoe.runtime.errors import KeyFileError

KEYS = ["A" * 40, "B" * 40]


class Now:
    """A wall clock that moves when told."""

    def __init__(self) -> None:
        self.unix_s = 1e9

    def __call__(self) -> float:
        return self.unix_s


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def roster(tmp_path: Path, now: Now) -> FileRoster:
    return FileRoster(tmp_path / "devices.json", now)


def test_a_token_is_spent_once(roster: FileRoster) -> None:
    secret = roster.invite("attic", "P" * 40).secret
    assert roster.name_of(KEYS[0]) is None
    assert roster.enrol("attic", secret, KEYS[0]) is None
    assert roster.name_of(KEYS[0]) == "attic"
    assert "unknown or was spent" in (roster.enrol("attic", secret, KEYS[1]) or "")
    assert roster.name_of(KEYS[1]) is None


def test_asking_again_with_the_same_key_is_no_theft(roster: FileRoster) -> None:
    secret = roster.invite("attic", "P" * 40).secret
    assert roster.enrol("attic", secret, KEYS[0]) is None
    assert roster.enrol("attic", secret, KEYS[0]) is None


def test_a_token_expires(roster: FileRoster, now: Now) -> None:
    secret = roster.invite("attic", "P" * 40, hours=1).secret
    now.unix_s += 3601
    assert "has expired; make another: wdmoe-bs enrol attic" in (roster.enrol("attic", secret, KEYS[0]) or "")


def test_a_token_is_for_one_name(roster: FileRoster) -> None:
    secret = roster.invite("attic", "P" * 40).secret
    assert "this token is for attic" in (roster.enrol("cellar", secret, KEYS[0]) or "")
    assert roster.enrol("attic", secret, KEYS[0]) is None


def test_a_newer_token_voids_the_older(roster: FileRoster) -> None:
    old, new = roster.invite("attic", "P" * 40).secret, roster.invite("attic", "P" * 40).secret
    assert roster.enrol("attic", old, KEYS[0]) is not None
    assert roster.enrol("attic", new, KEYS[0]) is None


def test_without_a_proven_key_nobody_enrols(roster: FileRoster) -> None:
    assert roster.enrol("attic", roster.invite("attic", "P" * 40).secret, None) is not None
    assert roster.name_of(None) is None


def test_a_revoked_key_is_refused_by_name_until_it_enrols_again(roster: FileRoster) -> None:
    roster.enrol("attic", roster.invite("attic", "P" * 40).secret, KEYS[0])
    assert roster.revoke("attic") and not roster.revoke("attic")
    assert roster.name_of(KEYS[0]) is None and "the key of attic was revoked" in roster.why_not(KEYS[0])
    assert "unknown key" in roster.why_not(KEYS[1])
    assert roster.enrol("attic", roster.invite("attic", "P" * 40).secret, KEYS[0]) is None
    assert roster.name_of(KEYS[0]) == "attic"


def test_revoking_voids_a_token_that_was_not_spent(roster: FileRoster) -> None:
    secret = roster.invite("attic", "P" * 40).secret
    assert roster.revoke("attic")
    assert roster.enrol("attic", secret, KEYS[0]) is not None


def test_another_process_sees_a_change_at_once(roster: FileRoster) -> None:
    other = FileRoster(roster.path)
    assert other.name_of(KEYS[0]) is None
    roster.enrol("attic", roster.invite("attic", "P" * 40).secret, KEYS[0])
    assert other.name_of(KEYS[0]) == "attic"
    other.revoke("attic")
    assert roster.name_of(KEYS[0]) is None


def test_the_file_holds_no_secret_that_could_be_spent(roster: FileRoster) -> None:
    token = roster.invite("attic", "P" * 40)
    text = roster.path.read_bytes()
    assert token.secret not in text and token.secret.hex().encode() not in text
    assert roster.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"devices": 1}'])
def test_a_damaged_file_is_refused_and_kept(roster: FileRoster, text: str) -> None:
    roster.path.write_text(text)
    with pytest.raises(KeyFileError, match=r"devices\.json"):
        roster.name_of(KEYS[0])
    assert roster.path.read_text() == text
