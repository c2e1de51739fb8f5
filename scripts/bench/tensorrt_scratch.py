"""How little scratch can TensorRT-RTX do with? Ways of asking for a small expert's products, and what each reserves.

    python -m pip install -e '.[tensorrt-gate]'
    python scripts/bench/tensorrt_scratch.py --json -

The check of `wdmoe.runtime.engines.tensorrt_plans` takes off what kernels set aside whatever the shape. This script shows what that
is and that nothing an engine could ask for avoids it: one product alone, of any shape; fixed and fewer tokens; layouts and
layers; the builder's settings; a bounded workspace. The expert is OLMoE's in float16 where no other is named; its
eighth is 1.6 MB. `beyond` is scratch less the activations; no bar, exit code 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path += [str(Path(__file__).parents[2])]
from scripts.bench._environment import environment, progress, write_json
from wdmoe.runtime.engines.tensorrt_network import ROWS, TOKEN_RANGES, Log, TokenRange, shared_logger

D_MODEL, D_FF = 2048, 1024  # of OLMoE
ONE_TOKEN, FEW_TOKENS = TokenRange(1, 1, 1), TokenRange(1, 8, 16)

Define = Callable[[Any, int, int], Any]  # (network definition, columns of a row, columns of the result) -> result
_kept: list[Any] = []  # constants, which TensorRT reads while it builds


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way of asking."""

    name: str
    define: Define
    d_model: int = D_MODEL
    d_ff: int = D_FF
    ranges: Sequence[TokenRange] = TOKEN_RANGES
    configure: Callable[[Any], None] = lambda config: None
    compute_capability: str = "SM86"

    @property
    def between(self) -> int:
        """Values for each token that lie between the projections: none if there is but one."""
        return 2 * self.d_ff if self.define.__name__ == "expert" else 0


def attempts(trt: Any) -> list[Attempt]:
    """List what is tried."""
    half, operation = trt.DataType.HALF, trt.MatrixOperation
    plain, turned = operation.NONE, operation.TRANSPOSE

    def rows_of(net: Any, width: int, dtype: Any = half) -> Any:
        return net.add_input(ROWS, dtype, (-1, width))

    def times(net: Any, values: Any, name: str, n_in: int, n_out: int) -> Any:
        return net.add_matrix_multiply(values, plain, net.add_input(name, half, (n_out, n_in)), turned).get_output(0)

    def expert(net: Any, d: int, f: int) -> Any:
        rows, product = rows_of(net, d), trt.ElementWiseOperation.PROD
        gate, up = times(net, rows, "gate", d, f), times(net, rows, "up", d, f)
        sigmoid = net.add_activation(gate, trt.ActivationType.SIGMOID).get_output(0)
        silu = net.add_elementwise(gate, sigmoid, product).get_output(0)
        return times(net, net.add_elementwise(silu, up, product).get_output(0), "down", f, d)

    def product(net: Any, d: int, f: int) -> Any:
        return times(net, rows_of(net, d), "weight", d, f)

    def product_in_out(net: Any, d: int, f: int) -> Any:
        weight = net.add_input("weight", half, (d, f))
        return net.add_matrix_multiply(rows_of(net, d), plain, weight, plain).get_output(0)

    def product_turned(net: Any, d: int, f: int) -> Any:
        weight = net.add_input("weight", half, (f, d))
        return net.add_matrix_multiply(weight, plain, rows_of(net, d), turned).get_output(0)

    def product_vectors(net: Any, d: int, f: int) -> Any:
        weight = net.add_input("weight", half, (1, f, d))
        return net.add_matrix_multiply(weight, plain, rows_of(net, d), operation.VECTOR).get_output(0)

    def product_constant(net: Any, d: int, f: int) -> Any:
        _kept.append(np.zeros((f, d), np.float16))
        weight = net.add_constant((f, d), trt.Weights(half, _kept[-1].ctypes.data, f * d)).get_output(0)
        return net.add_matrix_multiply(rows_of(net, d), plain, weight, turned).get_output(0)

    def einsum(net: Any, d: int, f: int) -> Any:
        return net.add_einsum([rows_of(net, d), net.add_input("weight", half, (f, d))], "nd,fd->nf").get_output(0)

    def convolution(net: Any, d: int, f: int) -> Any:
        images = net.add_shuffle(rows_of(net, d))
        images.reshape_dims = (-1, d, 1, 1)
        layer = net.add_convolution_nd(images.get_output(0), f, (1, 1), trt.Weights())
        layer.set_input(1, net.add_input("weight", half, (f, d, 1, 1)))
        return layer.get_output(0)

    def product_float(net: Any, d: int, f: int) -> Any:
        dtype = trt.DataType.FLOAT
        weight = net.add_input("weight", dtype, (f, d))
        return net.add_matrix_multiply(rows_of(net, d, dtype), plain, weight, turned).get_output(0)

    def no_product(net: Any, d: int, f: int) -> Any:
        """Multiply and add without a matrix product: no tensor cores, sums in float16."""
        column = net.add_shuffle(rows_of(net, d))
        column.reshape_dims = (-1, 1, d)
        weight = net.add_input("weight", half, (1, f, d))
        each = net.add_elementwise(column.get_output(0), weight, trt.ElementWiseOperation.PROD).get_output(0)
        return net.add_reduce(each, trt.ReduceOperation.SUM, 4, False).get_output(0)

    def workspace(limit_bytes: int) -> Attempt:
        def limit(config: Any) -> None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit_bytes)

        return Attempt(f"expert, workspace {limit_bytes / 1e6:.1f} MB", expert, configure=limit)

    def flag(name: str) -> Attempt:
        return Attempt(
            f"expert, {name}", expert, configure=lambda config: config.set_flag(getattr(trt.BuilderFlag, name))
        )

    def alone(name: str) -> Attempt:
        """Set a flag that allows one range of tokens."""
        return Attempt(
            f"expert, {name}, at most 64 tokens", expert, ranges=TOKEN_RANGES[:1], configure=flag(name).configure
        )

    def pool(name: str, limit_bytes: int) -> Attempt:
        kind = getattr(trt.MemoryPoolType, name)
        how = f"expert, {name} {limit_bytes} bytes"
        return Attempt(how, expert, configure=lambda config: config.set_memory_pool_limit(kind, limit_bytes))

    def setting(name: str, value: Any) -> Attempt:
        return Attempt(f"expert, {name} {value}", expert, configure=lambda config: setattr(config, name, value))

    activations, eighth = 2 * 2 * TOKEN_RANGES[-1].most * D_FF, 2 * 3 * D_MODEL * D_FF // 8
    forms = (
        product_in_out,
        product_turned,
        product_vectors,
        product_constant,
        product_float,
        einsum,
        convolution,
        no_product,
    )
    flags = ("DISABLE_TIMING_CACHE", "EXCLUDE_LEAN_RUNTIME", "REFIT", "REQUIRE_USER_ALLOCATION", "SPARSE_WEIGHTS", "STRICT_NANS",
             "STRIP_PLAN", "WEIGHT_STREAMING")  # fmt: skip
    return [
        Attempt("expert", expert),
        *(Attempt(f"expert, at most {ranges.most} tokens", expert, ranges=[ranges]) for ranges in (FEW_TOKENS, ONE_TOKEN)),
        *(Attempt(f"expert for {cc}", expert, compute_capability=cc) for cc in ("SM75", "SM80", "SM89", "SM120", "SM121")),
        *(setting("builder_optimization_level", level) for level in (0, 5)),
        *(setting("tiling_optimization_level", level) for level in trt.TilingOptimizationLevel.__members__.values()),
        setting("max_num_tactics", 1),
        setting("l2_limit_for_tiling", 0),
        setting("max_aux_streams", 0),
        setting("engine_capability", trt.EngineCapability.SAFETY),
        *map(flag, flags),
        alone("DISTRIBUTIVE_INDEPENDENCE"),
        pool("TACTIC_SHARED_MEMORY", 4096),
        pool("TACTIC_DRAM", 1_000_000),
        *(workspace(size) for size in (activations + eighth, 8_192_000, 10_240_000, 12_582_912)),
        *(Attempt(f"product {d}x{f}", product, d, f) for d, f in ((64, 64), (576, 96), (2048, 1024), (4096, 14336))),
        *(Attempt(f"product {d}x{f}, 1 token", product, d, f, [ONE_TOKEN]) for d, f in ((64, 64), (2048, 1024))),
        *(Attempt(f"product as {form.__name__}", form) for form in forms),
    ]  # fmt: skip


def tried(trt: Any, attempt: Attempt) -> dict[str, Any]:
    """Build it and look."""
    logger = shared_logger(trt)
    log = logger.current = Log()
    builder = trt.Builder(logger)
    net = builder.create_network(0)
    net.mark_output(attempt.define(net, attempt.d_model, attempt.d_ff))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, attempt.compute_capability), 0)
    attempt.configure(config)
    for tokens in attempt.ranges:
        profile = builder.create_optimization_profile()
        profile.set_shape(ROWS, *((n, attempt.d_model) for n in (tokens.least, tokens.best, tokens.most)))
        config.add_optimization_profile(profile)
    if builder.build_serialized_network(net, config) is None:
        return {"error": log.last_error}
    scratch = log.scratch_bytes[-len(attempt.ranges) :]
    beyond = [size - 2 * attempt.between * t.most for size, t in zip(scratch, attempt.ranges, strict=True)]
    return {"scratch_bytes": scratch, "beyond_bytes": beyond}


@click.command()
@click.option("--only", help="Only attempts whose name begins so.")
@click.option("--json", "target", metavar="FILE", help="Write the result as JSON; - for stdout.")
def main(only: str | None, target: str | None) -> None:
    """Try everything, say what it takes."""
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise click.ClickException(f"{error}: python -m pip install -e '.[tensorrt-gate]'") from error
    found: dict[str, dict[str, Any]] = {}
    for attempt in attempts(trt):
        if only is None or attempt.name.startswith(only):
            try:
                row = tried(trt, attempt)
            except AttributeError as error:  # this version has no such setting
                row = {"error": str(error)}
            found[attempt.name] = row
            sizes = row["error"][:100] if "error" in row else " / ".join(f"{n / 1e6:.2f}" for n in row["beyond_bytes"])
            progress(f"{attempt.name}: {sizes}{'' if 'error' in row else ' MB beyond the activations'}")
    if target is not None:
        write_json(target, {"attempts": found, **environment(("numpy", "tensorrt-rtx-cu13"))})


if __name__ == "__main__":
    main()
