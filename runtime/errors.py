"""Everything wdmoe raises for what the world did. A caller's mistake is a plain ValueError or TypeError.

WdmoeError
├── BundleError          a bundle or profile file is missing, damaged or of another version
├── CheckpointError      a checkpoint is incomplete, of an unknown type or in an unsafe format
├── DataError            evaluation rows are missing, damaged or do not fit the model
├── ProtocolError        a message is malformed, oversized or of another version
├── EngineError          an engine cannot be had, or gives wrong numbers
├── OutputError          a result cannot be written where it should go
└── DeviceError          something about one device; carries its name
    ├── DeviceTimeout    it missed a deadline
    ├── DeviceFailed     it answered with an error, or with rows that are not finite
    └── DevicesMissing   experts of the model that no connected device serves
"""

from __future__ import annotations


class WdmoeError(Exception):
    """Base of all errors of this project; its text is fit to be shown to a user."""


class BundleError(WdmoeError):
    """A bundle is missing, damaged, or of another version."""


class CheckpointError(WdmoeError):
    """A checkpoint cannot be exported as it stands."""


class DataError(WdmoeError):
    """Evaluation rows are missing, damaged, or do not fit the model."""


class ProtocolError(WdmoeError):
    """A message is malformed, too large, or of another version."""


class KeyFileError(WdmoeError):
    """A key is missing, damaged, or readable by others."""


class EngineError(WdmoeError):
    """An engine cannot be had on this machine, or gives wrong numbers."""


class OutputError(WdmoeError):
    """A result cannot be written where it should go."""


class DeviceError(WdmoeError):
    """Something went wrong with one device.

    Attributes:
        device: the name of the device, as it gave it in its hello.
    """

    def __init__(self, device: str, message: str) -> None:
        super().__init__(f"{device}: {message}")
        self.device = device


class DeviceTimeout(DeviceError):
    """A device missed a deadline."""


class DeviceFailed(DeviceError):
    """A device answered with an error, or with rows that are not finite."""


class DevicesMissing(WdmoeError):
    """Some experts are served by no connected device."""
