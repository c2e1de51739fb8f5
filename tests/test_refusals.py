"""Who must not take part, over real encrypted sockets: each hears why, and a run by the others goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from guarded import Guarded, open_guarded, served
from inprocess import make_service
from processes import command

from wdmoe.device.service import DeviceService
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.keys import KeyPair, make_key
from wdmoe.runtime.messages import PROTOCOL_VERSION, Hello


class Older(DeviceService):
    """A device of an older protocol."""

    def _hello(self) -> Hello:
        return msgspec.structs.replace(DeviceService._hello(self), protocol=0)


@pytest.fixture(scope="module")
def guarded(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with open_guarded(bundle, tmp_path_factory.mktemp("keys")) as opened:
        yield opened


def service_of(folder: Path, name: str, kind: type[DeviceService] = DeviceService, **manifest: Any) -> DeviceService:
    made = make_service(folder, RealClock())  # type: ignore[arg-type]
    changed = msgspec.structs.replace(made.manifest, **manifest)
    return kind(name, f"session-{name}", changed, made.engine, made.profile, made.clock)


def refused_words(guarded: Guarded, service: DeviceService, own: KeyPair, then: Callable[[], Any] | None = None) -> str:
    """Let a device try while runs go on; return what it was told. `then` is called once it is welcome."""
    words: list[str] = []
    hub = guarded.station.hub
    with served(service, guarded.station.config.listen, words, own, guarded.bs_public) as thread:
        for _ in range(500):
            guarded.run()
            guarded.station.pipeline.idle(0.02)
            if then is not None and service.name in hub.devices:
                then()
                then = None
            if not thread.is_alive() and service.name not in hub.devices:
                break
    guarded.run()
    assert sorted(hub.devices) == [f"device-{k}" for k in range(4)]
    assert words, "the device was not refused"
    return words[0]


def test_a_strangers_key(guarded: Guarded) -> None:
    service = service_of(guarded.bundle / "device-0", "stranger")
    said = refused_words(guarded, service, make_key(guarded.keys / "stranger.key"))
    assert said == (
        "the base station refused stranger: unknown key; enrol the device: `wdmoe-bs enrol NAME` here, "
        "`wdmoe-device --enrol TOKEN` there"
    )
    assert guarded.station.hub.refused.counts["key"] >= 1


def test_a_strangers_key_ends_the_command_with_these_words(guarded: Guarded) -> None:
    make_key(guarded.keys / "passer-by.key")
    (guarded.keys / "passer-by.bs").write_text(guarded.bs_public + "\n")
    options = ["--bundle", guarded.bundle / "device-1", "--bs", guarded.station.config.listen, "--engine", "numpy"]
    line = command("wdmoe-device", *options, "--name", "passer-by", "--encrypt", "--keys", guarded.keys)
    device = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while device.poll() is None:
            guarded.run()
            guarded.station.pipeline.idle(0.02)
    finally:
        device.kill()
        _, stderr = device.communicate()
    assert device.returncode == 1
    assert "Error: the base station refused passer-by: unknown key; enrol the device" in stderr
    assert "Traceback" not in stderr
    guarded.run()


def test_a_device_that_is_revoked_while_it_serves(guarded: Guarded) -> None:
    service = service_of(guarded.bundle / "device-2", "attic")  # comes before device-2, so it is the one that is asked
    said = refused_words(guarded, service, guarded.enrolled_key("attic"), lambda: guarded.roster.revoke("attic"))
    assert said == (
        "the base station refused attic: the key of attic was revoked; enrol the device again: wdmoe-bs enrol attic"
    )


def test_a_revoked_device_that_starts_again(guarded: Guarded) -> None:
    own = guarded.enrolled_key("cellar")
    assert guarded.roster.revoke("cellar")
    said = refused_words(guarded, service_of(guarded.bundle / "device-2", "cellar"), own)
    assert "the key of cellar was revoked" in said


def test_a_wrong_bundle(guarded: Guarded) -> None:
    service = service_of(guarded.bundle / "device-3", "porch", bundle_id="f" * 64)
    said = refused_words(guarded, service, guarded.enrolled_key("porch"))
    runs = guarded.station.manifest.bundle_id[:12]
    assert said == (
        f"the base station refused porch: porch: serves bundle ffffffffffff, the base station runs {runs} "
        "(qwen2_moe); copy the device folder of this bundle"
    )


def test_an_older_protocol(guarded: Guarded) -> None:
    service = service_of(guarded.bundle / "device-3", "shed", Older)
    said = refused_words(guarded, service, guarded.enrolled_key("shed"))
    assert said == (
        f"the base station refused shed: shed: speaks protocol 0, the base station {PROTOCOL_VERSION}; install the same version"
    )
