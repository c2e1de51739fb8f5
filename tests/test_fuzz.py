"""The short form of scripts/bench/fuzz.py: nothing crashes, nothing hangs, nothing damaged is taken for sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzzing.files import fuzz_files
from fuzzing.frames import Frames, Tally, recorded_frames
from fuzzing.inside import fuzz_base_station, fuzz_decoding, fuzz_service
from fuzzing.lawful import lawful
from fuzzing.sockets import fuzz_device_socket, fuzz_station_socket, throw_oversized
from guarded import open_guarded

Corpus = tuple[list[Frames], int]


@pytest.fixture(scope="module")
def corpus(bundle: Path) -> Corpus:
    return recorded_frames(bundle)


@pytest.fixture
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    assert (tally.crashes, tally.accepted, tally.hangs) == ([], [], [])


def test_what_a_real_run_says_is_lawful(corpus: Corpus) -> None:
    frames, d_model = corpus
    kinds = {lawful(message, d_model) for message in frames}
    assert None not in kinds and len(kinds) == 10


def test_damaged_frames_are_refused_or_are_lawful_messages(corpus: Corpus, tally: Tally) -> None:
    fuzz_decoding(np.random.default_rng(0), *corpus, 3000, tally)
    assert tally.counts["refused"] > 1000 and tally.counts["understood"] > 100
    assert tally.counts["lawful_refused"] == 0


def test_a_device_survives_damaged_frames(bundle: Path, corpus: Corpus, tally: Tally) -> None:
    fuzz_service(np.random.default_rng(1), corpus[0], bundle / "device-1", 1500, tally)


def test_a_base_station_works_on_among_strangers_and_stutterers(bundle: Path, corpus: Corpus, tally: Tally) -> None:
    fuzz_base_station(np.random.default_rng(2), corpus[0], bundle, 3000, tally)
    assert tally.counts["refused"] > 1000 and tally.counts["late_replies"] > 100


def test_strangers_at_the_port_are_refused_while_it_works(
    bundle: Path, corpus: Corpus, tally: Tally, tmp_path: Path
) -> None:
    with open_guarded(bundle, tmp_path) as guarded:
        fuzz_station_socket(np.random.default_rng(3), corpus[0], guarded, 500, tally, limit_s=30)
    assert tally.counts["refused"] >= 500


def test_a_stranger_as_base_station_does_not_harm_a_device(bundle: Path, corpus: Corpus, tally: Tally) -> None:
    fuzz_device_socket(np.random.default_rng(4), corpus[0], bundle / "device-1", 300, tally, limit_s=30)


@pytest.mark.slow
def test_a_device_takes_no_memory_for_an_oversized_frame_and_dials_again(bundle: Path, tally: Tally) -> None:
    throw_oversized(bundle / "device-1", [64 << 20], tally)
    assert tally.counts["oversized"] == 1


def test_every_damaged_file_is_refused_by_name(bundle: Path, tmp_path: Path, tally: Tally) -> None:
    fuzz_files(np.random.default_rng(5), bundle, tmp_path, 1, tally)
    assert tally.counts["refused"] + tally.counts["harmless"] == tally.counts["files_damaged"] > 200
