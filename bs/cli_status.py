"""`wdmoe-bs status`."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import click

from wdmoe.bs.cli_common import print_table, reported_errors
from wdmoe.runtime.errors import WdmoeError


@click.command(epilog="Example: wdmoe-bs status --health 127.0.0.1:5556   (a wdmoe-bs runs there with that option)")
@click.option("--health", default="127.0.0.1:5556", show_default=True, help="Where the other wdmoe-bs serves /health.")
@click.option("--timeout", type=float, default=5.0, show_default=True, help="Seconds to wait for an answer.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(health: str, timeout: float, as_json: bool) -> None:
    """Ask a running wdmoe-bs how it is. Exit code 1 unless it is ok or degraded."""
    with reported_errors():
        answer = _ask(f"http://{health}/health", timeout)
        if as_json:
            click.echo(json.dumps(answer, indent=1))
        else:
            from wdmoe.bs.tables import status_table

            print_table(status_table(answer))
    if answer["status"] not in ("ok", "degraded"):
        raise SystemExit(1)


def _ask(url: str, timeout_s: float) -> dict[str, Any]:
    try:
        with urlopen(url, timeout=timeout_s) as reply:
            answer: dict[str, Any] = json.load(reply)
    except HTTPError as error:
        answer = json.load(error)  # 503 carries the answer as well
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise WdmoeError(f"{url}: no answer ({reason}); start wdmoe-bs run or generate with --health") from error
    return answer
