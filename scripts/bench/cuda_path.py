"""The hand-off between two stages on a GPU: microseconds a layer, against plain torch, and parity with numpy.

    pip install 'wdmoe[bs,cuda-bs]' && python scripts/bench/cuda_path.py --json -

Two ways, network excluded: `out`, from the residual on the GPU to rows for each device in the host's memory; `back`, from the
devices' sums in the host's memory to the next residual and normed rows. torch does the same with its own operators, a copy to
the host for each device, and synchronises. Medians of 200 calls, float16 on the wire. Times of the kernels begin on an idle GPU,
so they hold the launches. Exit code 1 if the kernels are wrong, 2 without a GPU, after their parity in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
import handoff_reference as reference
from handoff_reference import Case
from processes import exit_on_sigterm

from scripts.bench._environment import CpuUse, environment, progress, write_json

ROWS = (1, 64, 1024)
BAR_US = 30.0  # both ways, at one row
_UNTIMED_CALLS, _CALLS = 20, 200
_NEEDED = ("torch", "triton")


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--rows", "counts", type=click.IntRange(min=1), multiple=True, default=ROWS, show_default=True)
@click.option("--d-model", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--experts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--devices", type=click.IntRange(min=1), default=4, show_default=True)
def main(target: str | None, counts: Sequence[int], d_model: int, experts: int, top_k: int, devices: int) -> None:
    """Measure the kernels between two stages."""
    exit_on_sigterm()
    if top_k > experts:
        raise click.BadParameter(f"{top_k} of {experts} experts", param_hint="--top-k")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        progress(f"{' and '.join(missing)} missing: pip install 'wdmoe[bs,cuda-bs]'; without a GPU 'wdmoe[cuda-test]'")
        sys.exit(2)
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    use = CpuUse()
    cases = [Case(rows, d_model, experts, top_k, devices, True) for rows in counts]
    if not has_gpu:  # which takes a second for ten rows
        cases = [Case(min(rows, 3), min(d_model, 96), experts, top_k, devices, True) for rows in counts]
    wrong = [str(case) for case in dict.fromkeys(cases) if not agrees("cuda" if has_gpu else "cpu", case)]
    points = [measure(case) for case in cases] if has_gpu else []
    for point in points:
        progress(f"{point['rows']} rows: {point['total_us']:.1f} us, torch {point['torch_total_us']:.1f} us")
    single = next((point["total_us"] for point in points if point["rows"] == 1), None)
    result = {
        "handoff_us_at_one_row": single,
        "bar_us": BAR_US,
        "within_bar": None if single is None else single <= BAR_US,
        "parity": not wrong,
        "wrong": wrong,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "shape": {"d_model": d_model, "experts": experts, "top_k": top_k, "devices": devices},
        "points": points,
        **use.since(),
        **environment(("numpy", "torch", "triton")),
    }
    if target is not None:
        write_json(target, result)
    if wrong:
        progress(f"the kernels differ from numpy: {'; '.join(wrong)}")
        sys.exit(1)
    if not has_gpu:
        progress("not run on a GPU: torch finds none here. In Triton's interpreter the kernels agree with numpy.")
        sys.exit(2)


def agrees(torch_device: str, case: Case) -> bool:
    """Hold the kernels against numpy; say where they differ."""
    try:
        inputs = reference.random_inputs(case)
        got = reference.hand_off(torch_device, case).route_and_pack(*reference.on_gpu(inputs, torch_device), "fp16")
        reference.check_routing(got, inputs)
        reference.check_rows(got, inputs, "fp16")
        reference.check_combine(torch_device, case, lost=False, shared=True)
    except AssertionError as error:
        progress(f"{case}: {error}")
        return False
    return True


def measure(case: Case) -> dict[str, Any]:
    """Time both ways, ours and torch's."""
    import torch

    inputs = reference.random_inputs(case)
    hand_off, given = reference.hand_off("cuda", case), reference.on_gpu(inputs, "cuda")
    residual, norm, *_ = given
    partials = reference.partials_of(inputs, np.random.default_rng(1))
    out_us = times_us(lambda: hand_off.route_and_pack(*given, "fp16"))
    back_us = times_us(lambda: hand_off.combine(residual, partials, None, None, 1.0, norm), torch.cuda.synchronize)
    plain = PlainTorch(case, *given)
    torch_out_us = times_us(plain.route_and_pack)
    torch_back_us = times_us(lambda: plain.combine(partials), torch.cuda.synchronize)
    return {
        "rows": case.rows,
        "out_us": out_us,
        "back_us": back_us,
        "total_us": out_us + back_us,
        "torch_out_us": torch_out_us,
        "torch_back_us": torch_back_us,
        "torch_total_us": torch_out_us + torch_back_us,
    }


def times_us(call: Callable[[], object], finish: Callable[[], object] = lambda: None) -> float:
    """Return the median time of a call, its `finish` included, after some that are not timed."""
    import torch

    times: list[float] = []
    for _ in range(_UNTIMED_CALLS + _CALLS):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        call()
        finish()
        times.append((time.perf_counter() - started_s) * 1e6)
    return float(np.median(times[_UNTIMED_CALLS:]))


class PlainTorch:
    """The same with torch's operators."""

    def __init__(self, case: Case, residual: Any, norm: Any, router: Any, owner: Any, n_devices: int) -> None:
        import torch

        self._case, self._residual, self._norm, self._router = case, residual, norm, router
        self._owner = torch.tensor(owner, device=residual.device)
        self._n_devices = n_devices

    def route_and_pack(self) -> list[Any]:
        """Norm, choose, and bring each device's rows to the host."""
        import torch

        hidden = self._normed(self._residual)
        probabilities = torch.softmax(hidden @ self._router.T, dim=1)
        weights, experts = torch.topk(probabilities, self._case.top_k, dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True)
        half, devices = hidden.half(), self._owner[experts]
        rows = [half[(devices == device).any(dim=1)].cpu().numpy() for device in range(self._n_devices)]
        return [experts.cpu().numpy(), weights.cpu().numpy(), *rows]

    def combine(self, partials: Sequence[Any]) -> Any:
        """Add the devices' sums to the residual, and norm it."""
        import torch

        total = self._residual.clone()
        for rows, values in partials:
            total.index_add_(0, torch.from_numpy(rows).to(total.device), torch.from_numpy(values).to(total.device))
        return total, self._normed(total)

    def _normed(self, rows: Any) -> Any:
        import torch

        inverse = torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + self._norm.epsilon)
        return rows * inverse * self._norm.weight


if __name__ == "__main__":
    main()
