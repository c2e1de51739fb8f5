"""Which devices belong to this base station: their public keys, by name, and the tokens that are still to be spent.

Kept in one JSON file beside the base station's key. Every change reads, edits and replaces the file under a lock, so
that `wdmoe-bs enrol` and `wdmoe-bs devices --revoke` work while another wdmoe-bs is running, and take effect there.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from wdmoe.runtime.errors import KeyFileError
from wdmoe.runtime.keys import Token, new_token, write_private

BS_KEY_NAME = "bs.key"
ROSTER_NAME = "devices.json"
TOKEN_HOURS = 24.0
_VERSION = 1


class Pass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token that has not been spent; the secret itself is not kept."""

    device: str
    secret_sha256: str
    expires_unix_s: float


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device that may connect."""

    key: str  # its public key
    since_unix_s: float


class Book(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the file."""

    version: int = _VERSION
    devices: dict[str, Enrolled] = {}
    passes: tuple[Pass, ...] = ()
    revoked: dict[str, str] = {}  # public key -> the name it had


class Roster(Protocol):
    """Who may speak: the file, or nobody asked (a link that is not encrypted)."""

    def name_of(self, key: str | None) -> str | None:
        """Return the name a key is enrolled under; None: a stranger."""
        ...

    def why_not(self, key: str | None) -> str:
        """Say why a stranger is one."""
        ...

    def enrol(self, device: str, secret: bytes, key: str | None) -> str | None:
        """Spend a token; return why that was refused, or None if the device is enrolled now."""
        ...


class FileRoster:
    """The roster in its file; notices what other processes change."""

    def __init__(self, path: Path, now_unix_s: Callable[[], float] = time.time) -> None:
        self.path = path
        self._now_unix_s = now_unix_s
        self._stamp: tuple[int, int, int] | None = None
        self._book = Book()
        self._names: dict[str, str] = {}

    def book(self) -> Book:
        """Return the content of the file as it is now.

        Raises:
            KeyFileError: the file is damaged.
        """
        try:
            found = self.path.stat()
        except FileNotFoundError:
            self._take(Book(), None)
            return self._book
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp != self._stamp:
            self._take(_read_book(self.path), stamp)
        return self._book

    def name_of(self, key: str | None) -> str | None:
        """Return the name a key is enrolled under; None: a stranger."""
        self.book()
        return self._names.get(key) if key is not None else None

    def why_not(self, key: str | None) -> str:
        """Say why a stranger is one."""
        if key is not None and (name := self.book().revoked.get(key)) is not None:
            return f"the key of {name} was revoked; enrol the device again: wdmoe-bs enrol {name}"
        return "unknown key; enrol the device: `wdmoe-bs enrol NAME` here, `wdmoe-device --enrol TOKEN` there"

    def invite(self, device: str, bs_public: str, hours: float = TOKEN_HOURS) -> Token:
        """Make a token for a device; an older one for the same name is void from now on."""
        if not hours > 0:
            raise ValueError(f"a token valid for {hours} hours is of no use")
        token = new_token(bs_public)
        fresh = Pass(device, _digest(token.secret), self._now_unix_s() + hours * 3600)
        with self._editing() as book:
            others = tuple(p for p in book.passes if p.device != device)
            self._write(msgspec.structs.replace(book, passes=(*others, fresh)))
        return token

    def enrol(self, device: str, secret: bytes, key: str | None) -> str | None:
        """Spend a token; return why that was refused, or None if the device is enrolled now."""
        if key is None:
            return "an enrolment needs an encrypted link"
        with self._editing() as book:
            spent = next((p for p in book.passes if p.secret_sha256 == _digest(secret)), None)
            if spent is None:
                if (known := book.devices.get(device)) is not None and known.key == key:
                    return None  # its first answer was lost on the way
                return "this token is unknown or was spent; make another: wdmoe-bs enrol NAME"
            if spent.expires_unix_s < self._now_unix_s():
                return f"this token for {spent.device} has expired; make another: wdmoe-bs enrol {spent.device}"
            if spent.device != device:
                return f"this token is for {spent.device}, the device calls itself {device}; start it with --name"
            devices = {**book.devices, device: Enrolled(key, self._now_unix_s())}
            left = tuple(p for p in book.passes if p is not spent)
            revoked = {k: name for k, name in book.revoked.items() if k != key}
            self._write(msgspec.structs.replace(book, devices=devices, passes=left, revoked=revoked))
        return None

    def revoke(self, device: str) -> bool:
        """Take a device off the roster, its unspent token too; False if it was not on it."""
        with self._editing() as book:
            known = book.devices.get(device)
            left = tuple(p for p in book.passes if p.device != device)
            if known is None and left == book.passes:
                return False
            devices = {name: entry for name, entry in book.devices.items() if name != device}
            revoked = book.revoked if known is None else {**book.revoked, known.key: device}
            self._write(msgspec.structs.replace(book, devices=devices, passes=left, revoked=revoked))
        return True

    @contextmanager
    def _editing(self) -> Iterator[Book]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self.book()

    def _write(self, book: Book) -> None:
        write_private(self.path, msgspec.json.format(msgspec.json.encode(book), indent=1).decode() + "\n")

    def _take(self, book: Book, stamp: tuple[int, int, int] | None) -> None:
        self._book, self._stamp = book, stamp
        self._names = {entry.key: name for name, entry in book.devices.items()}


def _read_book(path: Path) -> Book:
    try:
        book = msgspec.json.decode(path.read_bytes(), type=Book)
    except (msgspec.ValidationError, msgspec.DecodeError, OSError) as error:
        raise KeyFileError(
            f"{path}: not a list of devices ({error}); restore it, or remove it and enrol again"
        ) from error
    if book.version != _VERSION:
        raise KeyFileError(f"{path}: version {book.version}, expected {_VERSION}")
    return book


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
