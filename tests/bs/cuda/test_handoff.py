"""The kernels between two stages against what the CPU path does in numpy."""

from __future__ import annotations

from typing import Any

import handoff_reference as reference
import numpy as np
import pytest
from handoff_reference import Case

from wdmoe.bs.dispatch import PackedRows, entries, shipments_of
from wdmoe.bs.policies import Exact, select
from wdmoe.bs.routing import Plan
from wdmoe.runtime.messages import pack_rows

# rows, d_model, experts, top-k, devices, whether the chosen weights sum to one
CASES = (
    Case(1, 64, 8, 2, 4, True),
    Case(1, 48, 5, 1, 3, False),
    Case(3, 80, 16, 4, 1, True),
    Case(7, 96, 60, 8, 5, False),
    Case(5, 33, 8, 8, 9, True),
    Case(2, 64, 8, 1, 2, True),
)


def test_top_k_1_2_4_8_with_and_without_a_sum_of_one_are_among_the_cases() -> None:
    assert {case.top_k for case in CASES} == {1, 2, 4, 8}
    assert {case.normalise for case in CASES} == {True, False}


@pytest.mark.parametrize("wire", ["fp16", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_routing_and_rows_for_each_device_are_those_of_the_cpu(torch_device: str, case: Case, wire: Any) -> None:
    inputs = reference.random_inputs(case)
    got = reference.hand_off(torch_device, case).route_and_pack(*reference.on_gpu(inputs, torch_device), wire)
    reference.check_routing(got, inputs)
    reference.check_rows(got, inputs, wire)


@pytest.mark.parametrize("case", [Case(19, 80, 12, 4, 3, True), Case(33, 40, 20, 2, 2, False)], ids=str)
def test_programs_that_share_the_router_choose_as_those_of_one_row(torch_device: str, case: Case) -> None:
    inputs = reference.random_inputs(case)
    hand_off = reference.hand_off(torch_device, case, few_rows=4)
    got = hand_off.route_and_pack(*reference.on_gpu(inputs, torch_device), "fp16")
    reference.check_routing(got, inputs)
    reference.check_rows(got, inputs, "fp16")


def test_more_rows_than_are_counted_at_once_lie_where_the_host_looks(torch_device: str) -> None:
    case = Case(130, 16, 4, 1, 2, True)
    inputs = reference.random_inputs(case)
    got = reference.hand_off(torch_device, case, few_rows=4).route_and_pack(
        *reference.on_gpu(inputs, torch_device), "fp16"
    )
    reference.check_rows(got, inputs, "fp16")


@pytest.mark.parametrize("few_rows", [0, 64])
def test_of_equal_experts_the_first_is_chosen_as_on_the_cpu(torch_device: str, few_rows: int) -> None:
    case = Case(4, 64, 12, 4, 3, True)
    inputs = reference.random_inputs(case)
    inputs.router[[2, 5, 7]] = inputs.router[9]  # four that are equal in every row
    inputs.residual[1] = 0  # and a row to which all are
    logits = inputs.logits()
    np.testing.assert_array_equal(logits[:, [2, 5, 7]], logits[:, [9, 9, 9]])  # else this tells nothing of ties
    got = reference.hand_off(torch_device, case, few_rows).route_and_pack(
        *reference.on_gpu(inputs, torch_device), "fp16"
    )
    reference.check_routing(got, inputs)
    np.testing.assert_array_equal(got.routing.experts[1], [0, 1, 2, 3])
    for row in got.routing.experts:
        chosen = [expert for expert in row if expert in (2, 5, 7, 9)]
        assert chosen == sorted(chosen)


def test_devices_without_a_row_are_asked_for_nothing(torch_device: str) -> None:
    case = Case(3, 64, 8, 2, 6, True)
    inputs = reference.random_inputs(case)
    inputs.owner[:] = [1, 1, 1, 1, 4, 4, 4, 4]  # 0, 2, 3 and 5 hold nothing
    got = reference.hand_off(torch_device, case).route_and_pack(*reference.on_gpu(inputs, torch_device), "fp16")
    reference.check_rows(got, inputs, "fp16")
    plan = select(got.routing, inputs.owner, np.empty(0), Exact())
    names = [f"device-{k}" for k in range(6)]
    shipments = shipments_of(0, got.routing, plan, inputs.owner, names, got.packed)
    assert {shipment.device for shipment in shipments} <= {"device-1", "device-4"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is not finite, where it plays the GPU
@pytest.mark.parametrize(
    ("value", "packed"), [(65_519.0, True), (65_520.0, False), (np.inf, False), (np.nan, False), (-7e4, False)]
)
def test_rows_that_float16_does_not_hold_are_left_to_the_host(torch_device: str, value: float, packed: bool) -> None:
    case = Case(3, 64, 8, 2, 2, True)
    inputs = reference.random_inputs(case)
    inputs.norm[5] = value  # times a normed number of one
    inputs.residual[1] = 1.0
    inputs.residual[[0, 2], 5] = 0.0
    hand_off = reference.hand_off(torch_device, case)
    got = hand_off.route_and_pack(*reference.on_gpu(inputs, torch_device, epsilon=0.0), "fp16")
    assert (got.packed is not None) == packed
    if got.packed is not None:
        device = int(inputs.owner[got.routing.experts[1, 0]])
        assert got.packed.of(device, np.array([1]))[0, 5] == np.float16(65_504)  # the largest: rounded, not infinite
    assert (got.routing.experts >= 0).all() and (got.routing.experts < 8).all()  # even of what is not a number
    # float32 takes anything.
    single = hand_off.route_and_pack(*reference.on_gpu(inputs, torch_device, epsilon=0.0), "fp32")
    assert single.packed is not None and single.packed.wire == "fp32"


def test_a_plan_that_leaves_rows_out_or_asks_others_gets_its_rows(torch_device: str) -> None:
    case = Case(9, 48, 8, 2, 3, True)
    inputs = reference.random_inputs(case)
    got = reference.hand_off(torch_device, case).route_and_pack(*reference.on_gpu(inputs, torch_device), "fp16")
    rng = np.random.default_rng(5)
    keep = rng.random(got.routing.experts.shape) < 0.6
    elsewhere = rng.integers(0, 3, keep.shape)  # devices that the kernel knew nothing of
    names = ("a", "b", "c")
    by_host = PackedRows(*pack_rows(inputs.hidden(), "fp16"))
    for devices in (None, elsewhere):
        plan = Plan(keep, got.routing.weights * keep, devices=devices)
        ours = shipments_of(2, got.routing, plan, inputs.owner, names, got.packed)
        theirs = shipments_of(2, got.routing, plan, inputs.owner, names, by_host)
        for one, other in zip(ours, theirs, strict=True):
            assert (one.device, one.request) == (other.device, other.request)
            reference.assert_same_rows(one.packed, other.packed)
            assert len(entries(one.request)[0]) == sum(one.request.counts)


def test_rows_that_are_still_held_are_not_written_over(torch_device: str) -> None:
    case = Case(2, 64, 8, 2, 2, True)
    hand_off = reference.hand_off(torch_device, case)
    first = hand_off.route_and_pack(*reference.on_gpu(reference.random_inputs(case), torch_device), "fp16")
    device = int(np.argmax((first.packed.places >= 0).any(axis=1)))
    held = first.packed.of(device, np.flatnonzero(first.packed.places[device] >= 0))
    before = held.copy()
    del first
    for seed in range(1, 4):
        hand_off.route_and_pack(*reference.on_gpu(reference.random_inputs(case, seed), torch_device), "fp16")
    np.testing.assert_array_equal(held, before)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_sums_residual_and_norm_are_those_of_the_cpu(torch_device: str, case: Case, lost: bool, shared: bool) -> None:
    reference.check_combine(torch_device, case, lost, shared)


def test_a_block_that_nobody_was_asked_for_leaves_the_residual(torch_device: str) -> None:
    case = CASES[0]
    inputs = reference.random_inputs(case)
    residual, norm, *_ = reference.on_gpu(inputs, torch_device)
    summed, _ = reference.hand_off(torch_device, case).combine(residual, [], None, None, 1.0, norm)
    np.testing.assert_array_equal(summed.cpu().numpy(), inputs.residual)


def test_a_gpu_that_does_not_finish_is_an_error_with_its_name(
    torch_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wdmoe.bs.cuda import handoff
    from wdmoe.runtime.errors import EngineError

    monkeypatch.setattr(handoff, "_GPU_WAIT_S", 0.01)
    hand_off = reference.hand_off(torch_device, CASES[0])
    with pytest.raises(EngineError, match="has not finished in"):
        hand_off.wait(turn=7)
