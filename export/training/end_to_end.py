"""Carves a dense checkpoint with training end to end: planned, fitted block by block, trained, written.

The recipe of the small model that ships: experts that overlap and whose gate weights differ, low-rank changes of all
matrices, towards the dense model's next-token distribution and the text's own. After the fit and every few steps the
state is kept, and the same carving goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from wdmoe.export.calibration_text import split_windows
from wdmoe.export.carve import CarveShape, FfnWeights
from wdmoe.export.carve_artefact import CarveArtefact, changed
from wdmoe.export.carve_writing import bring_to_disk, check_room, write_block, write_rest
from wdmoe.export.carving import CarvePlan, OnProgress, Progress, TorchDevice
from wdmoe.export.dense import DenseModel, ffn_names
from wdmoe.export.training.fitting import fit_down
from wdmoe.export.training.planning import Calibrations, calibrate, calibration_bytes, plan_softly
from wdmoe.export.training.state import TrainingState
from wdmoe.export.training.steps import Step, TrainConfig, kept_tensors, perplexity, restore_student, train
from wdmoe.export.training.student import Student, StudentShape
from wdmoe.export.training.torch_dense import Dense, last_hidden, load_dense
from wdmoe.runtime.errors import EngineError

_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # the last on ARM


def carve_end_to_end(plan: CarvePlan, partial: Path, on_progress: OnProgress) -> dict[str, float]:
    """Write all files of the carved checkpoint.

    Args:
        plan: of `plan_carving`.
        partial: folder for them, and for the state meanwhile.
        on_progress: told how far it is.

    Returns:
        Perplexities on held-out text: of the dense model, of the carved one as planned and fitted, and as trained.

    Raises:
        CheckpointError: there is no room, another carving is in the folder, or the training fails.
        EngineError: the device that is asked for cannot be had.
    """
    config = plan.config
    torch_device = find_torch_device(config.torch_device)
    with TrainingState(partial, plan.recipe, config.steps) as state:
        if state.finished:
            return state.figures
        model = load_dense(plan.model, torch_device, matrix_dtype(torch_device))
        shape = StudentShape(plan.model.shape, config.rank, config.compiled, config.recompute)
        student = Student(model, None, shape)
        split = split_windows(plan.windows, config.seed, config.experts)
        parts = (torch.from_numpy(part) for part in (split.plan, split.fit, split.train, split.held_out))
        to_plan, to_fit, to_train, held_out = (part.to(torch_device) for part in parts)
        _check_room(plan, partial, student, len(to_plan))

        def judge(name: str, hidden: Callable[[torch.Tensor], torch.Tensor]) -> float:
            if name not in state.figures:
                on_progress(Progress("judging", 0, 1))
                state.note(name, perplexity(hidden, model.head, held_out))
                on_progress(Progress("judging", 1, 1, f"{name.replace('_', ' ')} {state.figures[name]:.2f}"))
            return state.figures[name]

        if state.step is None:
            student = started_student(model, to_plan, to_fit, shape, config.seed, partial, on_progress)
            state.write(0, kept_tensors(student))
        elif state.step == 0:
            restore_student(student, state.load()[1])
        judge("dense_perplexity", lambda batch: last_hidden(model, batch))
        judge("planned_perplexity", lambda batch: student(batch)[0])

        def on_step(step: Step) -> None:
            text = f"loss {step.loss:.3f} (KL {step.divergence:.3f})"
            on_progress(Progress("training", step.number, config.steps, text))

        on_progress(Progress("training", state.step or 0, config.steps))
        train(student, to_train, TrainConfig(config.steps, config.batch, config.rate), state, on_step)
        judge("trained_perplexity", lambda batch: student(batch)[0])
        _write(plan.model, student, partial, on_progress)
        bring_to_disk(partial)
        state.close_record()
        return state.figures


def started_student(
    model: Dense,
    to_plan: torch.Tensor,
    to_fit: torch.Tensor,
    shape: StudentShape,
    seed: int,
    scratch: Path,
    on_progress: OnProgress,
) -> Student:
    """Return the student before training: planned, and its down projections fitted.

    Args:
        model: the dense model.
        to_plan: windows to calibrate by.
        to_fit: windows to fit by.
        shape: of the student.
        seed: of all that is drawn.
        scratch: folder for what the blocks saw, see `calibration_bytes`.
        on_progress: told how far it is.
    """
    blocks, (hidden, neurons) = len(model.blocks), model.blocks[0].down.shape
    torch.manual_seed(seed)
    kept = Calibrations(scratch, blocks)
    on_progress(Progress("calibrating", 0, len(to_plan)))
    calibrate(model, to_plan, kept, lambda done: on_progress(Progress("calibrating", done, len(to_plan))))
    plans = []
    on_progress(Progress("planning", 0, blocks))
    for number, block in enumerate(model.blocks):
        torch.manual_seed(seed + number)
        generator = torch.Generator().manual_seed(seed + number)
        plans.append(plan_softly(kept.take(number, hidden, neurons), block.down.cpu(), shape.carved, generator))
        on_progress(Progress("planning", number + 1, blocks))
    torch.manual_seed(seed)
    student = Student(model, plans, shape)
    on_progress(Progress("fitting", 0, blocks))
    fit_down(student, to_fit, lambda done: on_progress(Progress("fitting", done, blocks)))
    return student


def artefact_of(student: Student, shape: CarveShape) -> CarveArtefact:
    """Return what carving and training make of the dense weights."""
    plans, changes = (tuple(getattr(own, part)() for own in student.blocks) for part in ("plan", "change"))
    return CarveArtefact(shape, plans, changes, student.norm.detach().cpu().numpy())


def find_torch_device(wanted: TorchDevice) -> str:
    """Return the device to train on.

    Raises:
        EngineError: it cannot be had.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise EngineError(
            f"--torch-device cuda: torch {torch.__version__} sees no NVIDIA GPU here; install a build of torch with "
            "CUDA and a driver for it, or give --torch-device cpu"
        )
    return "cuda" if there and wanted != "cpu" else "cpu"


def matrix_dtype(torch_device: str) -> torch.dtype:
    """Return the precision to train in: bfloat16 where the machine multiplies in it.

    A CPU that does not is several times as fast in float32 (AMD EPYC with AVX2, one thread, SmolLM2-135M, 512 tokens
    forward: 2.0 s, in bfloat16 12.2 s of processor time), which takes twice the memory.
    """
    if torch_device == "cuda":
        return torch.bfloat16
    flags = set(_CPU_INFO.read_text().split()) if _CPU_INFO.is_file() else set()
    return torch.bfloat16 if flags & _BFLOAT16_FLAGS else torch.float32


def _write(model: DenseModel, student: Student, folder: Path, on_progress: OnProgress) -> None:
    """Write the checkpoint; the changes go into the matrices."""
    artefact, blocks = artefact_of(student, model.shape), model.layout.spec.n_blocks

    def trained(name: str) -> bool:
        return not name.endswith(".bias") and name not in {model.layout.embedding, model.layout.head}

    def replaced(block: int) -> dict[str, torch.Tensor]:
        return {name: changed(name, model.matrix(name), artefact) for name in model.copied[block] if trained(name)}

    on_progress(Progress("writing", 0, blocks))
    for block in range(blocks):
        weights = FfnWeights(*(changed(name, model.matrix(name), artefact) for name in ffn_names(block)))
        write_block(folder, model, block, weights, artefact.blocks[block], replaced(block))
        on_progress(Progress("writing", block + 1, blocks))
    write_rest(folder, model, replaced(-1))


def _check_room(plan: CarvePlan, partial: Path, student: Student, plan_windows: int) -> None:
    model = plan.model
    state = 2 * 3 * 4 * sum(parameter.numel() for parameter in student.parameters())  # the old one and the new one
    seen = calibration_bytes(plan_windows, plan.config.window, plan.n_blocks, model.layout.spec.d_model, model.neurons)
    check_room(partial, model, 0, max(state, seen))
