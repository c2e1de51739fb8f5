"""Experiments 4, 5, 6, 8 and 9 in their short forms, on a tiny random model: they run, and say what their values say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from short_experiments import short_result

pytestmark = pytest.mark.timeout(300)


def run_short(name: str, work: Path) -> dict[str, Any]:
    """Run one, or find it done; return its values, with the finding among them."""
    result = short_result(name, work)
    assert (work / f"{name}.png").stat().st_size > 10_000 and "modelled" in result["origin"]
    assert result["finding"] == result["printed"].strip() and "nan" not in result["finding"]
    found: dict[str, Any] = {**result["values"], "finding": result["finding"]}
    return found


def under(by_policy: dict[str, Any], kind: str) -> Any:
    """What was found under the testbed's policy of a kind, whatever its options are."""
    (found,) = (values for name, values in by_policy.items() if name.partition(":")[0] == kind)
    return found


def test_scale_marks_what_does_not_fit_and_processes_answer_as_the_model(experiments_work: Path) -> None:
    found = run_short("e04_scale", experiments_work)
    live = found["live"]
    assert live["equal"] and live["largest_difference"] < 1e-3 and live["wall_ms_a_row"] > 0
    for medium in ("shared", "uniform", "per-block"):
        for name, points in found["scale"][medium].items():
            assert [point["devices"] for point in points] == [2, 8, 24]
            for point in points:
                low, high = point["gain"][1:]
                assert low <= point["gain"][0] <= high
                assert name != "exact" or point["gain"] == [0, 0, 0]
    # Two devices hold four experts each; a thousand would hold one, and share out the band in a thousand parts.
    assert found["scale"]["uniform"]["exact"][0]["experts_per_device"] == 4
    assert (
        found["scale"]["uniform"]["exact"][-1]["latency_mean_ms"]
        > found["scale"]["per-block"]["exact"][-1]["latency_mean_ms"]
    )
    assert found["copies"]["shared"]["exact"][-1]["copies"] == 4
    assert "3 device processes" in found["finding"]


def test_perception_says_who_keeps_up_with_reading(experiments_work: Path) -> None:
    found = run_short("e08_perception", experiments_work)
    assert found["reading_ms_a_token"] == pytest.approx(60e3 / 238 / found["tokens_per_word"])
    cable, radio = (found["links"][link]["exact"] for link in ("ethernet-1g", "wifi-5ghz-mid"))
    assert cable["token"][0] < radio["token"][0] and cable["first"][0] < radio["first"][0]
    assert all(page_s > first_s for page_s in radio["page_s"] for first_s in radio["first_s"])
    said, rows = found["finding"].split("\n\n")
    assert "Exact keeps up with reading on" in said and len(said.split()) < 150
    assert (
        len(rows.splitlines()) == 2 + 2 * len(found["links"])
        and len({row.count("|") for row in rows.splitlines()}) == 1
    )


def test_sets_are_compared_with_exact_row_by_row(experiments_work: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    found = run_short("e05_sets", experiments_work)
    ((_, by_policy),) = found["sets"].items()
    assert by_policy["exact"]["difference_points"] == [0, 0, 0] and by_policy["exact"]["latency_over_exact"] == [
        1,
        1,
        1,
    ]
    assert under(by_policy, "wlr")["latency_over_exact"][0] < 1
    assert found["pooled"]["exact"]["rows"] == 3
    chat = found["texts"]["chat"]
    assert chat["exact"]["over_exact"] == [1, 1, 1] and 4 < chat["exact"]["bits_per_byte"][0] < 20  # a random model
    assert under(chat, "wlr")["more_than_exact"][0] != 0


def test_rows_give_tokens_away_and_noise_hides_them_at_a_price(experiments_work: Path) -> None:
    found = run_short("e09_privacy", experiments_work)
    clear, loud = found["ways"]["float16"], found["ways"]["noise 1"]
    assert clear["perplexity_ratio"] == [1, 1, 1] and loud["perplexity_ratio"][0] != 1
    # The embeddings of the tiny model are random, and its first rows are nearly they.
    assert clear["recovered"][0][0] > 0.9 > loud["recovered"][0][0]
    assert clear["recovered"][0][0] > found["most_common_token"]
    assert len(found["share_of_rows"]) == 3 and all(0 < share <= 1 for share in found["share_of_rows"])


def test_troubles_show_where_they_are_planted(experiments_work: Path) -> None:
    found = run_short("e06_robustness", experiments_work)
    plain, noisy = (found["gate"][what]["exact"]["nats"] for what in ("as it is", "noise 1"))
    assert plain != noisy  # what the router says was changed
    for what, known in (("half as fast", "told"), ("twice as fast", "not corrected")):
        assert under(found["profile"]["air-bound"][what][known], "bottleneck")["latency_over_exact"][0] <= 1.001
    for fleet, profiles in found["profile"].items():
        half, twice = (under(profiles[what]["told"], "bottleneck")["latency_ms"] for what in profiles)
        assert min(half) > max(twice) * 0.9 and sum(half) > sum(twice)
        exact = found["slow_down"][fleet]["exact"]
        assert exact["corrected"] == exact["not corrected"]  # it looks at no latency
        assert min(exact["corrected"][2:]) > max(exact["corrected"][:2])  # a device became slower between them
    air, compute = (found["slow_down"][fleet]["exact"]["corrected"] for fleet in ("air-bound", "compute-bound"))
    assert compute[-1] / compute[0] > air[-1] / air[0]  # where devices are what is waited for, it shows
    said, *tables = found["finding"].split("\n\n")
    assert len(said.split()) < 150 and len(tables) == 2 and "Compute-bound, correcting" in said
