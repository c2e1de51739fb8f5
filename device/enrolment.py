"""The keys of a device: its own, the base station's, and how a token turns one into the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wdmoe.runtime.clock import Clock
from wdmoe.runtime.errors import ProtocolError, WdmoeError
from wdmoe.runtime.keys import KeyPair, Token, make_key, read_key, read_public_key, write_private
from wdmoe.runtime.links import BS, Link, Parcel
from wdmoe.runtime.messages import PROTOCOL_VERSION, Enrol, Enrolled, ErrorReport, Message, decode, encode

ENROL_WAIT_S = 30.0
_ASK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """What a device needs on an encrypted link."""

    own: KeyPair
    bs_public: str


def enrolled_keys(folder: Path, name: str) -> DeviceKeys:
    """Read the keys of a device that has enrolled.

    Raises:
        KeyFileError: it has not, or a file is damaged or readable by others.
    """
    bs_public = read_public_key(_bs_path(folder, name))
    return DeviceKeys(read_key(_own_path(folder, name)), bs_public)


def keys_to_enrol(folder: Path, name: str, token: Token) -> DeviceKeys:
    """Return the keys to enrol with; the device's own is made if it has none yet."""
    path = _own_path(folder, name)
    return DeviceKeys(read_key(path) if path.exists() else make_key(path), token.bs_public)


def enrol(
    link: Link, clock: Clock, folder: Path, name: str, token: Token, say: Callable[[str], None], d_model: int
) -> None:
    """Spend a token and remember the base station.

    Args:
        link: encrypted, with the keys of `keys_to_enrol`.
        clock: for the deadline.
        folder: of the keys.
        name: of this device.
        token: to spend.
        say: told how it went.
        d_model: width of a row, to read messages with.

    Raises:
        WdmoeError: the base station refuses, or does not answer.
    """
    deadline_s = clock.now_s() + ENROL_WAIT_S
    request = encode(Message(Enrol(PROTOCOL_VERSION, name, token.secret)))
    while clock.now_s() < deadline_s:
        for parcel in link.exchange([Parcel(BS, request)], _ASK_EVERY_S):
            try:
                header = decode(parcel.frames, d_model).header
            except ProtocolError:
                continue  # what is no message is no answer; the deadline stands
            if isinstance(header, Enrolled):
                write_private(_bs_path(folder, name), token.bs_public + "\n")
                say(f"{name}: enrolled; from now on it starts without --enrol")
                return
            if isinstance(header, ErrorReport):
                raise WdmoeError(f"the base station refused to enrol {name}: {header.text}")
    raise WdmoeError(
        f"no answer to the enrolment of {name} in {ENROL_WAIT_S:g} s; is wdmoe-bs running there (any command that "
        "listens, such as `wdmoe-bs devices --wait 60`), with the key that made this token?"
    )


def _own_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.key"


def _bs_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bs"
