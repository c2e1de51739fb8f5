from __future__ import annotations

import math

import pytest

from wdmoe.profiles.modelled import PRECISIONS, ExpertShape, experts_that_fit, hardware_names, modelled_profile

MIXTRAL = ExpertShape(4096, 14336)


@pytest.mark.parametrize("hardware", hardware_names())
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [MIXTRAL, ExpertShape(32, 24), ExpertShape(2048, 1024)])
def test_every_modelled_profile_is_monotone_labelled_and_names_a_source_for_each_value(
    hardware: str, precision: str, shape: ExpertShape
) -> None:
    profile = modelled_profile(hardware, precision, shape)
    times = [profile.call_ms(tokens) for tokens in range(1, 2100)]
    assert times == sorted(times) and times[0] > 0
    assert profile.origin == "modelled" and len(profile.sources) == 6
    assert all(point.p95_ms > point.p50_ms for point in profile.points)


# bytes / bandwidth / 0.7 + 0.05, and the token count where the peaks meet: reference figures for one Mixtral expert.
@pytest.mark.parametrize(
    ("hardware", "precision", "one_token_ms", "bend"),
    [
        ("agx-orin-64gb", "fp16", 2.46, 208),
        ("agx-orin-64gb", "int8", 1.23, 104),
        ("agx-orin-64gb", "int4", 0.63, 54),
        ("orin-nx-16gb", "fp16", 4.9, 146),
        ("orin-nano-8gb", "int4", 1.3, 42),
    ],
)
def test_an_expert_is_bound_by_reading_its_weights_and_then_by_arithmetic(
    hardware: str, precision: str, one_token_ms: float, bend: int
) -> None:
    profile = modelled_profile(hardware, precision, MIXTRAL)
    assert profile.call_ms(1) == pytest.approx(one_token_ms + 0.05, rel=0.03)
    assert profile.call_ms(bend - 2) == profile.call_ms(1)
    assert profile.call_ms(bend + 4) > profile.call_ms(1)


def test_reading_between_and_beyond_the_points_is_the_roofline_itself() -> None:
    profile = modelled_profile("agx-orin-64gb", "fp16", MIXTRAL)
    for tokens in (100, 300, 700, 3000):
        computing_ms = tokens * MIXTRAL.flops / (42.6e12 * 0.7) * 1e3
        reading_ms = MIXTRAL.weight_bytes("fp16") / (204.8e9 * 0.7) * 1e3
        assert profile.call_ms(tokens) == pytest.approx(0.05 + max(computing_ms, reading_ms), rel=5e-3)


@pytest.mark.parametrize(
    ("precision", "size_bytes"), [("fp16", 352_321_536), ("int8", 176_226_304), ("int4", 90_832_896)]
)
def test_weights_take_what_their_format_takes(precision: str, size_bytes: int) -> None:
    assert MIXTRAL.weight_bytes(precision) == size_bytes


def test_a_module_holds_what_four_fifths_of_its_memory_hold() -> None:
    assert experts_that_fit("orin-nano-8gb", "fp16", MIXTRAL) == math.floor(0.8 * 8e9 / 352_321_536) == 18


@pytest.mark.parametrize(
    ("hardware", "precision", "words"),
    [
        ("orin-mega", "fp16", "expected one of agx-orin-64gb"),
        ("orin-nx-8gb", "fp8", "expected one of fp16, int8, int4"),
    ],
)
def test_what_is_not_modelled_is_refused_with_what_is(hardware: str, precision: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        modelled_profile(hardware, precision, MIXTRAL)
