"""Keys of CURVE, ZeroMQ's encryption: made here, kept in files that only their owner can read.

Keys are 40 characters of Z85, as ZeroMQ hands them out. An enrolment token is one line that carries the base
station's public key and a secret that is spent once.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from wdmoe.runtime.errors import KeyFileError

_TOKEN_PREFIX = "wdmoe1."
_SECRET_BYTES = 16
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair; the secret half shows in no repr."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


@dataclass(frozen=True, slots=True)
class Token:
    """What a device needs to enrol."""

    bs_public: str
    secret: bytes  # 16 random bytes

    def __repr__(self) -> str:
        return f"Token(bs_public={self.bs_public!r})"

    def encode(self) -> str:
        """Return the token as one line to paste."""
        raw = z85.decode(self.bs_public) + self.secret
        return _TOKEN_PREFIX + base64.urlsafe_b64encode(raw).decode()


def new_token(bs_public: str) -> Token:
    """Make a token with a fresh secret."""
    return Token(bs_public, secrets.token_bytes(_SECRET_BYTES))


def decode_token(text: str) -> Token:
    """Read a token.

    Raises:
        ValueError: it is not one, or was cut when it was copied.
    """
    try:
        raw = base64.b64decode(text.strip().removeprefix(_TOKEN_PREFIX), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not text.strip().startswith(_TOKEN_PREFIX) or len(raw) != _KEY_BYTES + _SECRET_BYTES:
        raise ValueError("not an enrolment token; copy the whole line that `wdmoe-bs enrol NAME` printed")
    return Token(z85.encode(raw[:_KEY_BYTES]).decode(), raw[_KEY_BYTES:])


def default_keys_dir() -> Path:
    """Return the folder for keys: $XDG_CONFIG_HOME/wdmoe or ~/.config/wdmoe."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "wdmoe"


def make_key(path: Path) -> KeyPair:
    """Make a key pair and keep it.

    Raises:
        KeyFileError: the file is there already: a key is never overwritten.
    """
    public, secret = (half.decode() for half in zmq.curve_keypair())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, f"{public}\n{secret}\n", exclusive=True)
    return KeyPair(public, secret)


def read_key(path: Path) -> KeyPair:
    """Read a key pair.

    Raises:
        KeyFileError: it is missing, others can read it, or it is damaged.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError as error:
        raise KeyFileError(f"{path}: no key there; make one (base station: wdmoe-bs keygen)") from error
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror})") from error
    if stat.S_IMODE(mode) & 0o077:
        raise KeyFileError(
            f"{path}: mode {stat.S_IMODE(mode):04o} lets others read the secret key; run: chmod 600 {path}"
        )
    public, _, secret = text.strip().partition("\n")
    try:
        matches = zmq.curve_public(secret.encode()).decode() == public
    except (zmq.ZMQError, ValueError):
        matches = False
    if not matches:
        raise KeyFileError(f"{path}: damaged, its halves do not belong together; remove it and make a new one")
    return KeyPair(public, secret)


def read_public_key(path: Path) -> str:
    """Read a file that holds only a public key.

    Raises:
        KeyFileError: it is missing or damaged.
    """
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
        valid = len(z85.decode(text)) == _KEY_BYTES
    except FileNotFoundError as error:
        raise KeyFileError(f"{path}: no key there; enrol this device: wdmoe-device --enrol TOKEN") from error
    except (OSError, ValueError, KeyError):
        valid = False
    if not valid:
        raise KeyFileError(f"{path}: damaged; remove it and enrol this device again")
    return text


def write_private(path: Path, text: str, exclusive: bool = False) -> None:
    """Write a file that only its owner can read, under a temporary name, then give it its own.

    Raises:
        KeyFileError: `exclusive`, and the file is there already.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(partial, path)  # fails if the name is taken, where a rename would replace it
        else:
            partial.replace(path)
    except FileExistsError as error:
        raise KeyFileError(f"{path}: already there; it is not overwritten, remove it first") from error
    finally:
        partial.unlink(missing_ok=True)
