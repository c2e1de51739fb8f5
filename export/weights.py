"""Which weights lie in which file of the base station, and whether the checkpoint has them as the config says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wdmoe.export.checkpoint import Checkpoint, ExpertRows, TensorName, check_floats, wrong_shape
from wdmoe.export.conversion import Losses, to_float16, to_float32
from wdmoe.export.families import ExpertNames, ModelLayout
from wdmoe.export.tensor_writer import TensorWriter
from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.manifest import FileEntry, StagePrecision
from wdmoe.runtime.tensor_file import TensorSpan

Shape = tuple[int, ...]
# Matrices that stay float32 whatever the stages are: small, and what they say decides who is asked.
_ALWAYS_FLOAT32 = ("router", "shared_gate")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a file: tensors of the checkpoint, one below the other."""

    name: str
    sources: tuple[tuple[TensorName, Shape], ...]  # name in the checkpoint and shape it must have

    @property
    def shape(self) -> Shape:
        """Shape of the tensor written."""
        shapes = [shape for _, shape in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def stored_as(self, precision: StagePrecision) -> str:
        """Return the safetensors type that a part of the base station has: norms and biases are float32 as well."""
        half = precision == "fp16" and len(self.shape) > 1 and self.name not in _ALWAYS_FLOAT32
        return "F16" if half else "F32"


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a graph finds an initializer."""

    file: str
    span: TensorSpan


def stage_parts(layout: ModelLayout, block: int) -> tuple[Part, ...]:
    """List the weights of one stage; the last has the final norm alone."""
    spec, d_model = layout.spec, layout.spec.d_model
    if block == spec.n_blocks:
        return (Part("final_norm", ((layout.final_norm, (d_model,)),)),)
    names = layout.block(block)
    q_dim, kv_dim = spec.n_heads * spec.head_dim, spec.kv_dim
    parts = [
        Part("input_norm", ((names.input_norm, (d_model,)),)),
        Part(
            "wqkv",
            ((names.query, (q_dim, d_model)), (names.key, (kv_dim, d_model)), (names.value, (kv_dim, d_model))),
        ),
        Part("wo", ((names.output, (d_model, q_dim)),)),
        Part("post_norm", ((names.post_norm, (d_model,)),)),
        Part("router", ((names.router, (spec.n_experts, d_model)),)),
    ]
    if names.biases is not None:
        sizes = (q_dim, kv_dim, kv_dim)
        parts.append(Part("bqkv", tuple((name, (size,)) for name, size in zip(names.biases, sizes, strict=True))))
    if names.output_bias is not None:
        parts.append(Part("bo", ((names.output_bias, (d_model,)),)))
    if names.qk_norms is not None:
        query_norm, key_norm = names.qk_norms
        per_head = layout.qk_norm == "head"
        parts.append(Part("query_norm", ((query_norm, (spec.head_dim if per_head else q_dim,)),)))
        parts.append(Part("key_norm", ((key_norm, (spec.head_dim if per_head else kv_dim,)),)))
    return tuple(parts)


def shared_parts(layout: ModelLayout, block: int) -> tuple[Part, ...]:
    """List the weights of a block's shared expert; none where the model has none."""
    names = layout.block(block)
    if names.shared is None:
        return ()
    parts = expert_parts(names.shared, layout.shared_ff, layout.spec.d_model)
    if names.shared_gate is not None:
        parts += (Part("shared_gate", ((names.shared_gate, (1, layout.spec.d_model)),)),)
    return parts


def embedding_parts(layout: ModelLayout) -> tuple[Part, ...]:
    """List the embedding, which is the head as well where the two are tied."""
    return (Part("embedding", ((layout.embedding, (layout.spec.vocab_size, layout.spec.d_model)),)),)


def head_parts(layout: ModelLayout) -> tuple[Part, ...]:
    """List the weights of the head; none where it is tied to the embedding."""
    if layout.tied_head:
        return ()
    return (Part("head", ((layout.head, (layout.spec.vocab_size, layout.spec.d_model)),)),)


def expert_parts(names: ExpertNames, d_ff: int, d_model: int) -> tuple[Part, ...]:
    """List the weights of one expert in the order in which a file holds them."""
    return (
        Part("gate_proj", ((names.gate, (d_ff, d_model)),)),
        Part("up_proj", ((names.up, (d_ff, d_model)),)),
        Part("down_proj", ((names.down, (d_model, d_ff)),)),
    )


def station_parts(layout: ModelLayout) -> Iterator[Part]:
    """List every weight of the base station."""
    yield from embedding_parts(layout)
    for block in range(layout.spec.n_blocks):
        yield from stage_parts(layout, block)
        yield from shared_parts(layout, block)
    yield from stage_parts(layout, layout.spec.n_blocks)
    yield from head_parts(layout)


def all_expert_parts(layout: ModelLayout) -> Iterator[Part]:
    """List every weight of every routed expert."""
    spec = layout.spec
    for block in range(spec.n_blocks):
        for expert in range(spec.n_experts):
            yield from expert_parts(layout.expert(block, expert), spec.d_ff, spec.d_model)


def check_tensors(checkpoint: Checkpoint, layout: ModelLayout) -> None:
    """Check that the checkpoint has every tensor in the shape that its config implies, and none besides.

    A tensor that nothing here reads would be a part of the model that the graphs leave out: a bias, a norm.

    Raises:
        CheckpointError: names the tensor.
    """
    read: set[str] = set()
    for part in (*station_parts(layout), *all_expert_parts(layout)):
        for name, shape in part.sources:
            if (found := checkpoint.span(name).shape) != shape:
                raise wrong_shape(checkpoint.folder, name, found, shape)
            read.add(name.tensor if isinstance(name, ExpertRows) else name)
    check_floats(checkpoint, sorted(read))
    extra = sorted(name for name in checkpoint.names - read if not name.endswith("rotary_emb.inv_freq"))
    if layout.tied_head:
        extra = [name for name in extra if name != layout.head]
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {extra[0]} is not understood for a {layout.spec.family} model "
            f"({len(extra)} such); exporting without it would give wrong answers"
        )


def write_station_weights(
    path: Path,
    checkpoint: Checkpoint,
    parts: tuple[Part, ...],
    precision: StagePrecision,
    clamp: bool,
    on_bytes: Callable[[int], None],
    on_finished: Callable[[FileEntry, Losses], None],
) -> tuple[dict[str, Weight], FileEntry, Losses]:
    """Write weights of the base station.

    Args:
        path: of the safetensors file.
        checkpoint: where the weights come from.
        parts: what the file shall hold.
        precision: of its matrices.
        clamp: whether values that float16 cannot hold become its largest.
        on_bytes: called with the number of bytes read from the checkpoint since the last call.
        on_finished: called before the whole file gets its name.

    Raises:
        CheckpointError: a weight does not fit into float16.
    """
    losses = Losses()
    with TensorWriter(path, {part.name: (part.stored_as(precision), part.shape) for part in parts}) as writer:
        for part in parts:
            half = part.stored_as(precision) == "F16"
            for name, _ in part.sources:
                dtype = checkpoint.span(name).dtype
                for raw in checkpoint.pieces(name):
                    piece = to_float16(raw, dtype, name, losses, clamp, "--stages") if half else to_float32(raw, dtype)
                    writer.write(piece)
                    on_bytes(raw.nbytes)
        entry = writer.finish()
        on_finished(entry, losses)
        writer.rename(path)
    return {part.name: Weight(path.name, writer.spans[part.name]) for part in parts}, entry, losses
