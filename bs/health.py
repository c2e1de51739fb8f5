"""What is true right now, for `wdmoe-bs status` and monitors: computed when asked, never cached.

The server runs on a thread of its own, so that it answers also when the loop does not turn: that is what it then says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from wdmoe.bs.fleet import Health
from wdmoe.bs.hub import HEARTBEAT_S, Hub
from wdmoe.bs.pipeline import Pipeline
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.manifest import BsManifest

STALLED_S = 5.0  # work in flight, and no turn of the loop for so long
SILENT_S = 3 * HEARTBEAT_S


def snapshot(hub: Hub, pipeline: Pipeline, manifest: BsManifest) -> dict[str, Any]:
    """Describe the system as it is now.

    Returns:
        plain JSON values; `status` is one of ok, degraded (it works, but not with all it should have), failing (an
        expert has nobody to run it) and stalled (work is in flight and the loop has not turned for a while).
    """
    now_s = hub.clock.now_s()
    loop_age_s = now_s - hub.last_turn_s
    requests = pipeline.requests
    devices: list[dict[str, Any]] = [
        {
            "name": name,
            "state": requests.fleet.of(name).health.value,
            "reason": requests.fleet.of(name).reason,
            "failures": requests.fleet.of(name).failures,
            "last_heard_s": round(now_s - device.last_heard_s, 3),
            "round_trip_ms": device.latency.model().round_trip_ms,
            "correction": device.latency.model().correction,
            "experts": len(device.experts),
            "emulated": str(device.latency.profile.emulated or ""),
        }
        for name, device in sorted(hub.devices.items())
    ]
    gone = sorted(requests.fleet.gone)
    unserved = requests.unserved(manifest.model)
    # While nothing runs, nobody pings: then age says nothing about a device.
    silent = [d["name"] for d in devices if loop_age_s < SILENT_S and d["last_heard_s"] > SILENT_S]
    if pipeline.in_flight and loop_age_s > STALLED_S:
        status = "stalled"
    elif unserved:
        status = "failing"
    elif gone or silent or hub.missing_experts() or any(d["state"] != Health.HEALTHY.value for d in devices):
        status = "degraded"
    else:
        status = "ok"
    return {
        "status": status,
        "model": manifest.model.name,
        "bundle_id": manifest.bundle_id,
        "in_flight": pipeline.in_flight,
        "loop_age_s": round(loop_age_s, 3),
        "devices": devices,
        "gone": gone,
        "silent": silent,
        "experts_without_device": len(hub.missing_experts()),
        "experts_unserved": unserved,
        "late_replies": requests.late_replies,
        "replaced": requests.counts["replaced"],
        "hedged": requests.counts["hedged"],
        "skipped": requests.counts["skipped"],
        "refused": hub.refused.described(),
    }


@contextmanager
def serve_health(address: str, describe: Callable[[], dict[str, Any]]) -> Iterator[str]:
    """Answer GET /health with `describe()` while the context is open; yields the URL.

    The HTTP status is 200 for ok and degraded, 503 otherwise.

    Args:
        address: HOST:PORT; port 0 lets the system choose.
        describe: makes the answer, on the server's thread.

    Raises:
        WdmoeError: the address cannot be bound.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/health":
                self.send_error(404, "only /health is served")
                return
            answer = describe()
            body = json.dumps(answer, indent=1).encode() + b"\n"
            self.send_response(200 if answer["status"] in ("ok", "degraded") else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: stderr is for the user's progress."""

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--health is {address!r}, expected HOST:PORT")
    try:
        server = ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
    except OSError as error:
        raise WdmoeError(f"cannot serve /health on {address}: {error.strerror}; give another --health") from error
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}/health"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
