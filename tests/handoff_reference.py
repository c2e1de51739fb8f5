"""What the kernels between two stages should do, in numpy, for their tests and for scripts/bench/cuda_path.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.bs.dispatch import combine
from wdmoe.bs.routing import Floats, Ints, Routing, route
from wdmoe.runtime.messages import Wire, pack_rows

EPSILON = 1e-5
TOLERANCE = 2e-6  # relative to the largest: float32 sums in another order


@dataclass(frozen=True, slots=True)
class Case:
    """The sizes of one layer."""

    rows: int
    d_model: int
    n_experts: int
    top_k: int
    n_devices: int
    normalise: bool

    def __str__(self) -> str:
        weights = "sum to one" if self.normalise else "as they are"
        return f"{self.rows}x{self.d_model}, {self.top_k} of {self.n_experts} on {self.n_devices}, {weights}"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one layer begins with."""

    case: Case
    residual: Floats  # [n, d_model]
    norm: Floats  # [d_model]
    router: Floats  # [n_experts, d_model]
    owner: Ints  # [n_experts]

    def hidden(self) -> Floats:
        """Norm the rows."""
        return normed(self.residual, self.norm)

    def logits(self) -> Floats:
        """Weigh experts: equal rows of the router exactly alike.

        NOTE: A matrix product is not used: some BLAS add up the last columns otherwise than the first, so that which
        of equal experts is the larger would depend on the processor.
        """
        result: Floats = (self.hidden()[:, None, :] * self.router).sum(axis=2)
        return result

    def routing(self) -> Routing:
        """Choose experts as the CPU path does."""
        return route(self.logits(), self.case.top_k, self.case.normalise)


def random_inputs(case: Case, seed: int = 0) -> Inputs:
    """Make a layer whose routers have something to choose from."""
    rng = np.random.default_rng(seed)
    return Inputs(
        case,
        rng.standard_normal((case.rows, case.d_model), np.float32),
        rng.random(case.d_model, np.float32) + np.float32(0.5),
        rng.standard_normal((case.n_experts, case.d_model), np.float32) / np.float32(np.sqrt(case.d_model)),
        rng.permutation(np.arange(case.n_experts) % case.n_devices),
    )


def normed(rows: Floats, weight: Floats, epsilon: float = EPSILON) -> Floats:
    """Scale rows to unit mean square, then by the norm's weight."""
    inverse = 1 / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + np.float32(epsilon))
    result: Floats = (rows * inverse * weight).astype(np.float32)
    return result


def hand_off(torch_device: str, case: Case, few_rows: int = 256) -> Any:
    """Make the kernels ready for a case."""
    from wdmoe.bs.cuda.handoff import HandOff

    return HandOff(torch_device, case.top_k, case.normalise, few_rows)


def on_gpu(inputs: Inputs, torch_device: str, epsilon: float = EPSILON) -> tuple[Any, ...]:
    """Return what `route_and_pack` takes, but the wire."""
    import torch

    from wdmoe.bs.cuda.handoff import Norm

    residual, norm, router = (
        torch.tensor(array, device=torch_device) for array in (inputs.residual, inputs.norm, inputs.router)
    )
    return residual, Norm(norm, epsilon), router, inputs.owner, inputs.case.n_devices


def check_routing(got: Any, inputs: Inputs) -> None:
    """Compare what the kernel chose with the CPU path."""
    expected, hidden = inputs.routing(), inputs.hidden()
    np.testing.assert_array_equal(got.routing.experts, expected.experts)
    assert_close(got.routing.weights, expected.weights)
    assert_close(got.hidden.cpu().numpy(), hidden)
    assert_close(got.router_logits, inputs.logits())


def check_rows(got: Any, inputs: Inputs, wire: Wire) -> None:
    """Compare what lies ready for each device with the CPU path."""
    expected, wire_used = pack_rows(inputs.hidden(), wire)
    assert got.packed is not None and got.packed.wire == wire_used
    devices = inputs.owner[inputs.routing().experts]
    for device in range(inputs.case.n_devices):
        rows = np.flatnonzero((devices == device).any(axis=1))
        if len(rows):
            found = got.packed.of(device, rows)
            assert np.shares_memory(found, got.packed.rows)  # no copy between the GPU and the socket
            assert_same_rows(found, expected[rows])
        else:
            assert (got.packed.places[device] < 0).all()


def check_combine(torch_device: str, case: Case, lost: bool, shared: bool, factor: float = 0.22) -> None:
    """Compare sum, residual and norm with the CPU path."""
    import torch

    inputs, rng = random_inputs(case), np.random.default_rng(1)
    partials = partials_of(inputs, rng)
    share = rng.random(case.rows, np.float32) * np.float32(0.9) if lost else None
    if share is not None:
        share[-1] = 1.0  # a token that lost everything
    own = rng.standard_normal(inputs.residual.shape, np.float32) if shared else None
    moe_out = combine(case.rows, case.d_model, partials, share, own)
    expected = inputs.residual + np.float32(factor) * moe_out
    residual, norm, *_ = on_gpu(inputs, torch_device)
    on_device = None if own is None else torch.tensor(own, device=torch_device)
    summed, after = hand_off(torch_device, case).combine(residual, partials, share, on_device, factor, norm)
    assert_close(summed.cpu().numpy(), expected)
    assert_close(after.cpu().numpy(), normed(expected, inputs.norm))


def partials_of(inputs: Inputs, rng: np.random.Generator) -> list[tuple[Ints, Floats]]:
    """Make the answers of the devices that are asked for something."""
    devices = inputs.owner[inputs.routing().experts]
    asked = [np.flatnonzero((devices == device).any(axis=1)) for device in range(inputs.case.n_devices)]
    return [(rows, rng.standard_normal((len(rows), inputs.case.d_model), np.float32)) for rows in asked if len(rows)]


def assert_close(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Allow what float32 sums in another order differ by."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(expected).max())))


def assert_same_rows(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Allow the last bit, where a sum in another order was rounded otherwise."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    step = 2**-10 if got.dtype == np.float16 else 2**-21
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=step, atol=1e-6)
