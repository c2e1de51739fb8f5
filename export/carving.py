"""Carves a dense Llama-family checkpoint into a Qwen2-MoE checkpoint, block by block.

Calibration tokens go through the dense model once. At each block the inputs of its feed-forward decide how that is
carved (carve.py) and what its down projections become (distilling.py); the block is written, and the hidden states that
the next one sees are kept, so that an interrupted carving goes on there. In memory are one block and the hidden states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wdmoe.export.calibration_text import Windows, calibration_windows, split_windows, windows_wanted
from wdmoe.export.carve import BlockPlan, FfnWeights, FloatArray, plan_block
from wdmoe.export.carve_state import END_TO_END, BlockReport, CarveState, check_unfinished, read_record
from wdmoe.export.carve_writing import as_stored, bring_to_disk, check_room, write_block, write_rest
from wdmoe.export.checkpoint import open_checkpoint
from wdmoe.export.conversion import to_float32
from wdmoe.export.dense import DenseModel, dense_model
from wdmoe.export.dense_forward import Attention, add_feed_forward, rms_norm
from wdmoe.export.distilling import carved_down, fit_down, relative_error
from wdmoe.runtime.errors import CheckpointError

Distil = Literal["none", "layer", "end-to-end"]
TorchDevice = Literal["auto", "cpu", "cuda"]
OnPhase = Callable[[int, str], None]  # block, what is done to it; called when it begins

PHASES = ("attention", "planning", "fitting", "writing")  # of each block
_RECIPE_VERSION = 1  # raise it when the same options are to give other files
_TOKENS = 32_768  # of calibration text
_PLAN_ROWS = 8192
_PLAN_BYTES = 1 << 28  # of the activations [rows, neurons] that a plan is made from; five such arrays are alive


@dataclass(frozen=True, slots=True)
class CarveConfig:
    """What the user asks for."""

    out: Path
    calibration: tuple[Path, ...]  # text files
    experts: int = 8
    top_k: int = 2
    shared: int | None = None  # neurons; None: half of a block's
    distil: Distil = "layer"
    tokens: int | None = None  # of calibration text; None: 32,768, or what the training steps need
    window: int = 512  # tokens
    seed: int = 0
    # Of distillation end to end alone:
    expert_neurons: int | None = None  # of a routed expert; None: as many as leave a third of a block idle
    steps: int = 800
    batch: int = 4  # windows of a step
    rank: int = 12  # of what is changed in the matrices
    rate: float = 1.5e-3
    torch_device: TorchDevice = "auto"
    compiled: bool = True  # by torch.compile; the result differs by rounding
    recompute: bool = True  # less memory, more time, the same result

    @property
    def end_to_end(self) -> bool:
        """Whether the carved model is trained."""
        return self.distil == END_TO_END


@dataclass(frozen=True)
class CarvePlan:
    """A carving that can be carried out: all was checked, nothing is written yet."""

    model: DenseModel
    windows: Windows
    config: CarveConfig

    @property
    def n_blocks(self) -> int:
        """Blocks of the model."""
        return self.model.layout.spec.n_blocks

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides what is written."""
        config, checkpoint = self.config, self.model.checkpoint
        training = ("steps", "batch", "rank", "rate") if config.end_to_end else ()
        return {
            "version": _RECIPE_VERSION,
            "made_by": f"wdmoe {version('wdmoe')}",
            "dense": checkpoint.config.get("_name_or_path") or checkpoint.folder.resolve().name,
            "dense_sha256": checkpoint.source_sha256,
            "blocks": self.n_blocks,
            **asdict(self.model.shape),
            "distil": config.distil,
            "calibration_tokens": int(self.windows.token_ids.size),
            "calibration_sha256": hashlib.sha256(self.windows.token_ids.tobytes()).hexdigest(),
            "window": config.window,
            "seed": config.seed,
            **{name: getattr(config, name) for name in training},
        }

    @property
    def active_share(self) -> float:
        """Share of a block's neurons that work on a token."""
        shape = self.model.shape
        return (shape.shared + shape.experts_per_token * shape.expert_neurons) / self.model.neurons


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a distillation end to end has come."""

    phase: str  # calibrating, planning, fitting, judging, training, writing
    done: int
    total: int  # windows, blocks, or steps
    text: str = ""  # what was measured


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Carved:
    """What a carving made."""

    out: Path
    already_there: bool
    blocks: tuple[BlockReport, ...]  # none after a training
    figures: dict[str, float] = field(default_factory=dict)  # of a training: perplexities on held-out text


def plan_carving(folder: Path, config: CarveConfig) -> CarvePlan:
    """Check a dense checkpoint and cut the calibration text into windows.

    Raises:
        CheckpointError: it cannot be carved, or the text is too short; names the remedy.
        ValueError: the neurons cannot be dealt out as asked.
    """
    checkpoint = open_checkpoint(folder)
    if config.expert_neurons is not None and not config.end_to_end:
        raise ValueError("--expert-neurons: experts overlap only with --distil end-to-end; give --shared instead")
    model = dense_model(
        checkpoint,
        experts=config.experts,
        top_k=config.top_k,
        shared=config.shared,
        overlap=config.end_to_end,
        expert_neurons=config.expert_neurons,
    )
    if config.window > model.layout.spec.max_positions:
        raise ValueError(
            f"--window {config.window} is more than the model's {model.layout.spec.max_positions} positions"
        )
    tokens = config.tokens
    if tokens is None:
        tokens = config.window * windows_wanted(config.steps, config.batch) if config.end_to_end else _TOKENS
    plan = CarvePlan(model, calibration_windows(checkpoint, config.calibration, tokens, config.window), config)
    if config.end_to_end:
        split_windows(plan.windows, config.seed, config.experts)
    return plan


def carve_checkpoint(
    plan: CarvePlan,
    on_phase: OnPhase = lambda _block, _phase: None,
    on_block: Callable[[int, BlockReport], None] = lambda _block, _report: None,
    on_progress: OnProgress = lambda _progress: None,
) -> Carved:
    """Write the carved checkpoint.

    Args:
        plan: of `plan_carving`.
        on_phase: told what begins.
        on_block: told of each block that is finished, those of an earlier, interrupted run too.
        on_progress: told instead of these two how a distillation end to end goes on.

    Raises:
        CheckpointError: something else is at the place of the result, or there is no room for it.
    """
    out, recipe, model = plan.config.out.absolute(), plan.recipe, plan.model  # absolute: `.` has no name
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        record = read_record(out) if out.is_dir() else None
        if record is None or record.get("recipe") != recipe:
            raise CheckpointError(f"{out}: already there and not this carving; choose another --out or remove it")
        blocks = tuple(BlockReport(**block) for block in record["blocks"])
        return Carved(out, True, blocks, record.get("figures", {}))
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_unfinished(partial, recipe)
    if plan.config.end_to_end:
        from wdmoe.export.training.end_to_end import carve_end_to_end

        figures = carve_end_to_end(plan, partial, on_progress)
        _give_name(partial, out)
        return Carved(out, False, (), figures)
    with CarveState(partial, recipe) as state:
        check_room(partial, model, len(state.blocks), 2 * 4 * plan.windows.token_ids.size * model.layout.spec.d_model)
        for number, report in enumerate(state.blocks):
            on_block(number, report)
        _carve_blocks(partial, plan, state, on_phase, on_block)
        write_rest(partial, model)
        state.close_record()
        _give_name(partial, out)
    return Carved(out, False, tuple(state.blocks))


def _give_name(partial: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()  # empty, as was checked
    bring_to_disk(partial)
    partial.rename(out)
    bring_to_disk(out.parent)


def _carve_blocks(
    partial: Path, plan: CarvePlan, state: CarveState, on_phase: OnPhase, on_block: Callable[[int, BlockReport], None]
) -> None:
    if len(state.blocks) == plan.n_blocks:
        return
    model, window = plan.model, plan.config.window
    hidden = state.hidden()
    if hidden is None:
        hidden = _embedded(model, plan.windows)
    for block in range(len(state.blocks), plan.n_blocks):
        on_phase(block, "attention")
        attention = Attention(model, block, window)
        for text in hidden:
            text += attention(text)
        del attention
        dense = model.feed_forward(block)
        norm, eps = model.matrix(model.layout.block(block).post_norm), model.layout.norm_eps
        weights, block_plan, errors = _carve_one(plan, block, dense, hidden, norm, on_phase)
        on_phase(block, "writing")
        entry = write_block(partial, model, block, weights, block_plan)
        del weights
        add_feed_forward(hidden.reshape(-1, hidden.shape[-1]), norm, eps, dense)
        del dense
        if not np.isfinite(hidden).all():
            raise CheckpointError(
                f"{model.checkpoint.folder}: what comes out of block {block} is not finite; its weights are damaged, "
                "download the checkpoint again"
            )
        report = BlockReport(entry.sha256, entry.size_bytes, *errors)
        state.add(report, hidden)
        on_block(block, report)


def _carve_one(
    plan: CarvePlan, block: int, dense: FfnWeights, hidden: FloatArray, norm: FloatArray, on_phase: OnPhase
) -> tuple[FfnWeights, BlockPlan, tuple[float, float]]:
    """Carve one block.

    Args:
        plan: of the whole.
        block: its number.
        dense: its feed-forward.
        hidden: the residual after its attention, [windows, tokens, d_model].
        norm: weight of the norm before its feed-forward.
        on_phase: told what begins.

    Returns:
        Its weights in the order of the plan, the plan, and the relative errors on held-out rows, cut and fitted.
    """
    shape, eps = plan.model.shape, plan.model.layout.norm_eps
    held_out = plan.windows.held_out
    residual = hidden[~held_out].reshape(-1, hidden.shape[-1])
    rows = rms_norm(residual, norm, eps)
    judged = rms_norm(hidden[held_out].reshape(-1, hidden.shape[-1]), norm, eps)

    on_phase(block, "planning")
    rng = np.random.default_rng([plan.config.seed, block])
    count = min(len(rows), _PLAN_ROWS, max(shape.experts, _PLAN_BYTES // (4 * shape.neurons)))
    made = plan_block(dense, rows[np.sort(rng.choice(len(rows), count, replace=False))], shape, rng)
    exact = shape.experts_per_token == shape.experts
    # All experts, always: a router has nothing to choose, and with equal gates the carved block is the dense block.
    made = replace(made, router=np.zeros_like(made.router) if exact else as_stored(plan.model, block, made.router))

    on_phase(block, "fitting")
    down = carved_down(dense, made)
    error = before = relative_error(dense, made, down, judged, shape)
    if plan.config.distil == "layer" and not exact:
        fitted = fit_down(dense, made, rows, residual, shape)
        after = relative_error(dense, made, fitted, judged, shape)
        if after < before:  # too little text for so many neurons makes it worse
            down, error = fitted, after
    order = made.permutation
    placed = FfnWeights(dense.gate[order], dense.up[order], down)
    settled = replace(made, permutation=np.arange(len(order)), scales=np.ones(len(order), np.float32))
    return placed, settled, (before, error)


def _embedded(model: DenseModel, windows: Windows) -> FloatArray:
    """Look the tokens up, [windows, tokens, d_model], with the rows that are used alone in memory."""
    ids, places = np.unique(windows.token_ids, return_inverse=True)
    name = model.layout.embedding
    used = np.asarray(model.checkpoint.tensor(name)[ids])
    rows: FloatArray = to_float32(used, model.checkpoint.span(name).dtype)
    return rows[places.reshape(windows.token_ids.shape)]
