"""What the hub may answer becomes one sentence that says what to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from wdmoe.export.models import _hub_checkpoint, hub_problem
from wdmoe.runtime.errors import CheckpointError

_ID = "somebody/gated-moe"


class _GatedHub(BaseHTTPRequestHandler):
    """Describes every model and refuses its files, as the hub does with a gated one."""

    def do_GET(self) -> None:
        described = self.path.startswith("/api/models/")
        body = json.dumps({"id": _ID, "sha": "0" * 40} if described else {"error": "gated"}).encode()
        self.send_response(200 if described else 401)
        self.send_header("X-Error-Code", "" if described else "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def gated_hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _GatedHub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_gated_model_whose_files_are_refused_names_licence_login_and_path(gated_hub: str) -> None:
    with pytest.raises(CheckpointError, match=r"accept its licence .*`hf auth login`; or give --model PATH"):
        _hub_checkpoint(_ID, lambda _: None, gated_hub)


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset by peer"), RuntimeError("\nxet"), OSError(28, "no room")]
)
def test_a_download_that_breaks_off_can_be_gone_on_with(error: Exception) -> None:
    assert "download broke off (" in (said := str(hub_problem(_ID, error)))
    assert said.endswith("; the same command goes on, or give --model PATH") and "\n" not in said


def test_what_is_not_cached_offline_names_the_way_to_fetch_it(tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    said = str(hub_problem(_ID, LocalEntryNotFoundError("no")))
    assert f"hf download {_ID} --local-dir FOLDER" in said
