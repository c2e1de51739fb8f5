"""Writes the folder of the base station: stages, shared experts, head, tokenizer."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wdmoe.export.checkpoint import Checkpoint
from wdmoe.export.conversion import Losses
from wdmoe.export.families import ModelLayout
from wdmoe.export.journal import Finished, Journal
from wdmoe.export.weights import (
    Part,
    Weight,
    embedding_parts,
    head_parts,
    shared_parts,
    stage_parts,
    write_station_weights,
)
from wdmoe.runtime.manifest import FileEntry, StagePrecision, sha256_of
from wdmoe.runtime.tensor_file import read_spans

if TYPE_CHECKING:
    import onnx

TOKENIZER_NAME = "tokenizer.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"


@dataclass(slots=True)
class StationFolder:
    """What was written, for the manifest."""

    stages: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    head: str = "head.onnx"
    tokenizer: str | None = None
    chat_template: str | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def model_hashes(self) -> dict[str, str]:
        """Hashes of graphs and weights, which name the bundle."""
        texts = (self.tokenizer, self.chat_template)
        return {name: entry.sha256 for name, entry in self.files.items() if name not in texts}


@dataclass(frozen=True, slots=True)
class StationWeights:
    """One weight file as written."""

    entry: FileEntry
    weights: dict[str, Weight]
    losses: Losses


def weight_files(layout: ModelLayout) -> dict[str, tuple[Part, ...]]:
    """List the weight files of the base station, and what each holds."""
    blocks = range(layout.spec.n_blocks)
    files = {"embedding.safetensors": embedding_parts(layout)}
    files |= {f"stage_{block:02d}.safetensors": stage_parts(layout, block) for block in (*blocks, len(blocks))}
    if layout.spec.shared_expert:
        files |= {f"shared_{block:02d}.safetensors": shared_parts(layout, block) for block in blocks}
    if not layout.tied_head:
        files["head.safetensors"] = head_parts(layout)
    return files


def put_weights(
    path: Path,
    parts: tuple[Part, ...],
    checkpoint: Checkpoint,
    journal: Journal,
    precision: StagePrecision,
    clamp: bool,
    on_bytes: Callable[[int], None],
) -> StationWeights:
    """Write one weight file, or find it written."""
    how = f"{precision} clamped" if clamp else precision
    key = f"{checkpoint.stamp} bs {how} {path.name}"
    if (finished := journal.find(key)) is not None and _is_whole(path, finished.entry):
        on_bytes(sum(checkpoint.span(name).size_bytes for part in parts for name, _ in part.sources))
        return StationWeights(
            finished.entry,
            {name: Weight(path.name, span) for name, span in read_spans(path).items()},
            finished.losses,
        )

    def note(entry: FileEntry, losses: Losses) -> None:
        journal.add(key, Finished(entry, losses))

    weights, entry, losses = write_station_weights(path, checkpoint, parts, precision, clamp, on_bytes, note)
    return StationWeights(entry, weights, losses)


def write_station(
    folder: Path, checkpoint: Checkpoint, layout: ModelLayout, files: Mapping[str, StationWeights]
) -> StationFolder:
    """Write graphs and texts beside the weights; everything but the manifest is there then.

    Args:
        folder: of the base station.
        checkpoint: where the tokenizer is.
        layout: of the model.
        files: by name, all of `weight_files`.
    """
    from wdmoe.export.graphs import head_graph, shared_graph, stage_graph

    written = StationFolder(files={name: file.entry for name, file in files.items()})
    embedding = files["embedding.safetensors"].weights
    for block in range(layout.spec.n_blocks + 1):
        used = files[f"stage_{block:02d}.safetensors"].weights
        graph = stage_graph(layout, block, used | embedding if block == 0 else used)
        written.stages.append(f"stage_{block:02d}.onnx")
        written.files[written.stages[-1]] = write_graph(folder / written.stages[-1], graph)
    if layout.spec.shared_expert:
        for block in range(layout.spec.n_blocks):
            graph = shared_graph(layout, block, files[f"shared_{block:02d}.safetensors"].weights)
            written.shared.append(f"shared_{block:02d}.onnx")
            written.files[written.shared[-1]] = write_graph(folder / written.shared[-1], graph)
    head = embedding if layout.tied_head else files["head.safetensors"].weights
    written.files[written.head] = write_graph(folder / written.head, head_graph(layout, head))
    _write_texts(folder, checkpoint, written)
    return written


def _is_whole(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size_bytes and sha256_of(path) == entry.sha256


def write_graph(path: Path, graph: onnx.ModelProto) -> FileEntry:
    """Write a graph; its bytes depend on nothing but its content."""
    data = graph.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return FileEntry(hashlib.sha256(data).hexdigest(), len(data))


def chat_template_of(checkpoint: Checkpoint) -> str | None:
    """Find the chat template: a file of its own, or a field of tokenizer_config.json."""
    path = checkpoint.folder / CHAT_TEMPLATE_NAME
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = (checkpoint.json("tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _write_texts(folder: Path, checkpoint: Checkpoint, written: StationFolder) -> None:
    if (checkpoint.folder / TOKENIZER_NAME).is_file():
        written.tokenizer = TOKENIZER_NAME
        shutil.copyfile(checkpoint.folder / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    if (template := chat_template_of(checkpoint)) is not None:
        written.chat_template = CHAT_TEMPLATE_NAME
        (folder / CHAT_TEMPLATE_NAME).write_text(template, encoding="utf-8")
    for name in (written.tokenizer, written.chat_template):
        if name is not None:
            written.files[name] = FileEntry(sha256_of(folder / name), (folder / name).stat().st_size)
