"""Experiment 9: how well tokens can be told from the rows that a device sees, and what hiding them costs in quality.

    python scripts/experiments/e09_privacy.py --data-dir DIR --json FILE --plot FILE.png

An eavesdropper knows the published model, has text of its own, and takes the rows off the link: for each block a ridge
regression from rows to the embeddings of their tokens, and the nearest embedding by cosine as its guess, of the whole
vocabulary. It is tested on windows of text that it was not fitted to. One device holds all experts, so it sees every row; what
a device of the testbed would see is said beside. Rows travel as float16, as int8, or with Gaussian noise of so many times a
row's root mean square; the eavesdropper fits itself to the same noise. A better attacker may do better: these are lower bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import (
    TINY,
    Settings,
    Values,
    bootstrap,
    error_bars,
    experiment,
    progress,
    spell,
)
from scripts.experiments._model import bundle, trace, windows
from scripts.experiments._more import open_tapped
from wdmoe.bs.microbatch import pack_questions
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Question
from wdmoe.bs.routing import pairs_used
from wdmoe.bs.virtual import VirtualDevice
from wdmoe.export.checkpoint import open_checkpoint
from wdmoe.export.models import find_checkpoint
from wdmoe.runtime.manifest import BsManifest, read_manifest
from wdmoe.runtime.messages import ExpertRequest, Message, Wire, decode, encode, pack_rows, unpack_rows
from wdmoe.runtime.virtual_time import Frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
TRAINED, TESTED = 96, 20  # windows
BLOCKS = 6  # that are looked at, evenly from the first to the last
RIDGE = 1e-2  # of the mean variance of a row's entries
WAYS: dict[str, tuple[Wire, float]] = {  # how rows travel, and noise over their root mean square
    "float16": ("fp16", 0.0),
    "int8": ("int8", 0.0),
    "noise 0.1": ("fp16", 0.1),
    "noise 0.3": ("fp16", 0.3),
    "noise 1": ("fp16", 1.0),
}


@dataclass(slots=True)
class Eavesdropper:
    """Stands before a device: adds the noise, and keeps what the device then sees; see `TimedPeer`."""

    device: VirtualDevice
    noise: float
    seen: dict[int, list[Rows]]  # by block
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def take(self, frames: Frames, now_s: float) -> None:
        """Add noise to a request's rows, keep them, and hand it on."""
        message = decode(frames, self.device.manifest.model.d_model)
        if isinstance(message.header, ExpertRequest):
            assert message.rows is not None
            rows = unpack_rows(message.rows)
            if self.noise:
                rows = noisy(rows, self.noise, self.rng)
                packed, wire = pack_rows(rows, message.header.wire)
                assert wire == message.header.wire
                frames = encode(Message(message.header, packed))
            if message.header.block in self.seen:
                self.seen[message.header.block].append(np.array(rows))
        self.device.take(frames, now_s)

    def next_s(self) -> float:
        """As the device says."""
        return self.device.next_s()

    def due(self, now_s: float) -> Iterable[Frames]:
        """As the device says."""
        return self.device.due(now_s)


def noisy(rows: Rows, noise: float, rng: np.random.Generator) -> Rows:
    """Add Gaussian noise of `noise` times each row's root mean square."""
    scale = noise * np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    result: Rows = (rows + scale * rng.standard_normal(rows.shape)).astype(np.float32)
    return result


def measure(settings: Settings) -> Values:
    trained, tested = (8, 4) if settings.short else (TRAINED, TESTED)
    ways = dict(list(WAYS.items())[::2]) if settings.short else WAYS
    manifest = read_manifest(bundle(settings) / "bs", BsManifest)
    model = manifest.model
    folder = bundle(settings, model.n_experts)
    blocks = sorted({int(b) for b in np.linspace(0, model.n_blocks - 1, BLOCKS).round()})
    embedding = embeddings(settings)
    with open_tapped(folder) as station:
        text = windows(settings, station, trained + tested)
    hidden = [window for k, window in enumerate(text) if k % ((trained + tested) // tested) == 0][:tested]
    names = {window.name for window in hidden}
    own = [window for window in text if window.name not in names]
    own_ids, own_rows, _ = overhear(folder, own, blocks, "fp16", 0.0)
    progress(f"overheard {len(own_ids)} rows of {len(own)} windows in {len(blocks)} blocks")
    tokens = np.array([len(window.choices[0].continuation) for window in hidden])
    found: dict[str, Values] = {}
    clear: npt.NDArray[np.float64] | None = None
    for way, (wire, noise) in ways.items():
        ids, rows, nats = overhear(folder, hidden, blocks, wire, noise)
        clear = nats if clear is None else clear
        more = nats - clear

        def ratio(drawn: Ints, more: Any = more) -> float:
            return float(np.exp(more[drawn].sum() / tokens[drawn].sum()))

        recovered: list[list[float]] = []
        unseen: list[float] = []
        for block in blocks:
            fitted = travelled(own_rows[block], wire, noise)
            right = guess(fitted, own_ids, rows[block], embedding) == ids
            recovered.append(list(bootstrap(lambda drawn, right=right: float(right[drawn].mean()), len(right), 500)))  # type: ignore[misc]
            new = ~np.isin(ids, own_ids)
            unseen.append(float(right[new].mean()) if new.any() else 0.0)
        found[way] = {
            "recovered": recovered,
            "of_unseen_tokens": unseen,
            "perplexity_ratio": bootstrap(ratio, len(more)),
        }
        progress(f"{way}: {recovered[0][0]:.0%} of tokens in the first block, {recovered[-1][0]:.0%} in the last")
    common = np.bincount(own_ids).argmax()
    return {
        "blocks": blocks,
        "rows_fitted": len(own_ids),
        "rows_tested": len(ids),
        "vocabulary": len(embedding),
        "most_common_token": float((ids == common).mean()),
        "ways": found,
        "share_of_rows": shares(settings),
    }


def overhear(
    folder: Path, text: Sequence[Question], blocks: Sequence[int], wire: Wire, noise: float
) -> tuple[Ints, dict[int, Rows], npt.NDArray[np.float64]]:
    """Read text exactly over an eavesdropped link.

    Returns:
        the tokens [n]; by block the rows that the only device saw of them [n, d_model]; the nats of each window.
    """
    seen: dict[int, list[Rows]] = {block: [] for block in blocks}
    ids: list[Ints] = []
    nats: list[float] = []
    with open_tapped(folder, None, lambda device: Eavesdropper(device, noise, seen), wire) as station:
        for window in text:
            packed = pack_questions([window], station.manifest.model.sliding_window)
            ((_, result, _),) = station.pipeline.run([packed], Exact())
            ids.append(packed.token_ids)
            nats.append(-float(result.logprobs.sum(dtype=np.float64)))
    return np.concatenate(ids), {block: np.concatenate(rows) for block, rows in seen.items()}, np.array(nats)


def travelled(rows: Rows, wire: Wire, noise: float) -> Rows:
    """Return rows as they would have been seen: what the eavesdropper makes of its own."""
    packed, _ = pack_rows(rows, wire)
    arrived = unpack_rows(packed)
    return noisy(arrived, noise, np.random.default_rng(1)) if noise else arrived


def guess(rows: Rows, ids: Ints, others: Rows, embedding: Rows) -> Ints:
    """Fit rows [n, d] to the embeddings of their tokens; return the nearest token of each of the others [m]."""
    mean = rows.mean(axis=0)
    centred = (rows - mean).astype(np.float64)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
    target = embedding[ids]
    middle = target.mean(axis=0)
    weights = np.linalg.solve(gram, centred.T @ (target - middle)).astype(np.float32)
    known = embedding - middle
    known = known / np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-9)
    result: Ints = ((others - mean) @ weights @ known.T).argmax(axis=1)
    return result


def embeddings(settings: Settings) -> Rows:
    """Return the embedding of every token, [vocabulary, d_model]: the model is published."""
    folder = settings.work / "tiny-checkpoint"
    if settings.model != TINY:
        folder, _ = find_checkpoint(settings.model, progress)
    values: Rows = np.asarray(open_checkpoint(folder).tensor("model.embed_tokens.weight"), np.float32)
    return values


def shares(settings: Settings) -> list[float]:
    """Return the share of rows that each device of the testbed sees in a block, the mean over blocks."""
    recorded = trace(settings, 8 if settings.short else 160)
    seen = []
    for block, owner in enumerate(recorded.placement):
        experts = recorded.routing(block).experts
        seen.append(pairs_used(experts, np.ones(experts.shape, np.bool_), owner, int(owner.max()) + 1).mean(axis=0))
    return [float(share) for share in np.mean(seen, axis=0)]


def finding(values: Values) -> str:
    ways, blocks = values["ways"], values["blocks"]
    clear = ways["float16"]
    first, last = ([100 * end for end in clear["recovered"][k]] for k in (0, -1))
    said = [
        (
            f"Fitted to {values['rows_fitted']:,} rows of its own, a linear probe tells {spell(first, '.0f')} % of tokens from "
            f"the float16 rows of block {blocks[0]}, and {spell(last, '.0f')} % from those of block {blocks[-1]} "
            f"({100 * clear['of_unseen_tokens'][0]:.0f} and {100 * clear['of_unseen_tokens'][-1]:.0f} % of the tokens that "
            f"it was never fitted to), among {values['vocabulary']:,}; always guessing the commonest is right in "
            f"{100 * values['most_common_token']:.0f} %."
        )
    ]
    for way, one in ways.items():
        if way == "float16":
            continue
        worst = max(one["recovered"], key=lambda interval: float(interval[0]))
        said.append(
            f"{way}: at most {spell([100 * end for end in worst], '.0f')} % in any block, at "
            f"{spell(one['perplexity_ratio'], '.3f')} times the perplexity."
        )
    bar = [way for way, one in ways.items() if one["perplexity_ratio"][2] <= 1.02]
    least = min(bar, key=lambda way: max(float(i[0]) for i in ways[way]["recovered"]))
    said.append(
        f"Of what stays within 1.02 times the perplexity, {least} hides most, and still lets "
        f"{100 * max(i[0] for i in ways[least]['recovered']):.0f} % through: who holds experts must be trusted with the "
        f"text. A device of the testbed sees {' / '.join(f'{100 * share:.0f}' for share in values['share_of_rows'])} % of "
        "a block's rows, but there are many blocks."
    )
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    looks = (("#222222", "s", 8), ("#4477aa", "o", 4), ("#ddaa33", "o", 4), ("#cc6677", "o", 4), ("#882255", "o", 4))
    for (way, one), (colour, marker, size) in zip(values["ways"].items(), looks, strict=False):
        # float16 hollow and larger: what int8 does lies on it.
        drawn = {"color": colour, "label": way, "marker": marker, "ms": size}
        drawn |= {"markerfacecolor": "none"} if marker == "s" else {}
        points = [[100 * end for end in interval] for interval in one["recovered"]]
        error_bars(left, values["blocks"], points, **drawn)
        ratio, low, high = one["perplexity_ratio"]
        right.errorbar(
            ratio, np.mean([point[0] for point in points]), xerr=[[max(0, ratio - low)], [max(0, high - ratio)]],
            capsize=2, ls="none", **drawn,
        )  # fmt: skip
    left.axhline(100 * values["most_common_token"], color="#999999", lw=0.8, ls="--", label="the commonest token")
    left.set(xlabel="block", ylabel="tokens told from rows, %", ylim=(0, 105), title="by block")
    left.legend(fontsize=7)
    right.set(
        xlabel="perplexity over that of float16 rows",
        ylabel="tokens told from rows, mean of the blocks, %",
        ylim=(0, 105),
        title="what hiding costs",
    )
    right.set_xscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.axvline(1.02, color="#117733", lw=1, ls="--", zorder=0, label="bar of quality")
    right.margins(x=0.2)
    right.legend(fontsize=7, loc="lower left")


main = experiment("What a device can read", measure, finding, draw)

if __name__ == "__main__":
    main()
