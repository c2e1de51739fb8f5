"""A device process for benchmarks: the real device code over an engine that returns its rows, and a bare echo beside it.

    python scripts/bench/_identity_device.py --bundle DIR/device-0 --bs ADDRESS --keys DIR --token TOKEN --echo ADDRESS

The echo is pyzmq alone: a DEALER socket, encrypted as the link is, on a thread of this process that sends back what comes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import click
import zmq

sys.path.append(str(Path(__file__).parents[2]))
from wdmoe.device.config import DeviceConfig
from wdmoe.device.main import serve_folder
from wdmoe.runtime.engines import ENGINES
from wdmoe.runtime.keys import decode_token
from wdmoe.runtime.manifest import ExpertEntry
from wdmoe.runtime.messages import Rows


class IdentityEngine:
    """Every expert returns its rows: what is left is the price of reaching it."""

    name = "identity"
    version = "1"
    tolerance = float("inf")  # the golden outputs are those of real experts

    def __init__(self, folder: Path, experts: Sequence[ExpertEntry], threads: int) -> None:
        import onnxruntime  # noqa: F401 - as in the engine that it stands for: rows are cast by it

    def run(self, block: int, expert: int, rows: Rows) -> Rows:
        """Return the rows; see `ExpertEngine`."""
        return rows


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--bs", required=True)
@click.option("--keys", type=click.Path(path_type=Path), required=True)
@click.option("--token", required=True)
@click.option("--echo", required=True)
def main(bundle: Path, bs: str, keys: Path, token: str, echo: str) -> None:
    """Serve until stopped."""
    bs_public = decode_token(token).bs_public.encode()
    threading.Thread(target=send_back, args=(echo, bundle.name.encode(), bs_public), name="echo", daemon=True).start()
    ENGINES["identity"] = f"{__name__}:{IdentityEngine.__name__}"
    sys.exit(serve_folder(DeviceConfig(bundle=bundle, bs=bs, engine="identity", keys=keys, enrol=token)))


def send_back(address: str, name: bytes, server_public: bytes) -> None:
    """Echo until the process ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
    sock.curve_serverkey = server_public
    sock.setsockopt(zmq.LINGER, 0)
    sock.connect(address)
    sock.send(name)
    while True:
        sock.send_multipart(sock.recv_multipart())


if __name__ == "__main__":
    main()
