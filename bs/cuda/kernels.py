"""What happens between two stages on the GPU, as Triton kernels; TRITON_INTERPRET=1 runs them on the CPU.

    residual -> norm, router, softmax, top-k (`route_kernel`) -> rows, cast, by device, in the host's memory (`pack_kernel`)
    the devices' sums in the host's memory -> sum, residual, norm of the next stage (`combine_kernel`)

Whatever the host reads lies in pinned memory, which the GPU writes through the bus while it computes. The last program of
`pack_kernel` sets a flag there when all is written, so that the host need not synchronise with the GPU. Numbers that change
from call to call are not specialised: Triton would compile a kernel anew in the middle of a run.
"""

# NOTE: no postponed annotations here: Triton's interpreter knows a constexpr by the annotation itself.
import triton
import triton.language as tl

FLOAT16_END = tl.constexpr(65520.0)  # from here on, float16 rounds to infinity


@triton.jit(do_not_specialize=["n_rows"])
def route_kernel(
    residual, norm, router, hidden, logits, experts, weights, owner, used,
    n_rows, d_model, n_experts, epsilon,
    top_k: tl.constexpr, normalise: tl.constexpr, rows: tl.constexpr,
    width_block: tl.constexpr, expert_block: tl.constexpr, device_block: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Norm `rows` rows, ask the router, choose experts.

    Args:
        residual: [n, d_model] float32.
        norm: [d_model] float32, weights of the norm before the experts.
        router: [n_experts, d_model] float32.
        hidden: [n, d_model] float32, written: the normed rows.
        logits: [n, n_experts] float32, written to the host.
        experts: [n, top_k] int64, written to the host, descending in weight; of equals the lower one first.
        weights: [n, top_k] float32, written to the host, as the model would use them.
        owner: [n_experts] int32, the device of each expert.
        used: [n, device_block] int32, written: whether the row goes to the device.
        n_rows: n.
        d_model: width of a row.
        n_experts: of a block.
        epsilon: of the norm.
        top_k: experts of a token.
        normalise: whether the chosen weights are scaled to sum to one.
        rows: of one program: 1, or at least 16.
        width_block: a power of two from d_model up.
        expert_block: a power of two from n_experts up, at least 16.
        device_block: a power of two from the number of devices up.
        chunk: columns of the router at once, a power of two from 16 up.
    """
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    here = row < n_rows
    start = row.to(tl.int64)[:, None] * d_model
    column = tl.arange(0, width_block)
    inside = here[:, None] & (column < d_model)[None, :]
    values = tl.load(residual + start + column[None, :], mask=inside, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / d_model + epsilon)
    scale = tl.load(norm + column, mask=column < d_model, other=0.0)
    tl.store(hidden + start + column[None, :], values * inverse[:, None] * scale[None, :], mask=inside)

    expert = tl.arange(0, expert_block)
    is_expert = expert < n_experts
    router_start = router + expert.to(tl.int64)[:, None] * d_model
    # The normed rows are made again, a chunk at a time: what was stored above was stored by other threads.
    if rows == 1:
        products = tl.zeros((expert_block, chunk), tl.float32)
        for first in range(0, d_model, chunk):
            part = first + tl.arange(0, chunk)
            in_row = part < d_model
            normed = tl.load(residual + start + part[None, :], mask=here[:, None] & in_row[None, :], other=0.0)
            normed = normed * inverse[:, None] * tl.load(norm + part, mask=in_row, other=0.0)[None, :]
            taught = tl.load(router_start + part[None, :], mask=is_expert[:, None] & in_row[None, :], other=0.0)
            products += taught * normed
        logit = tl.sum(products, axis=1)[None, :]
    else:
        logit = tl.zeros((rows, expert_block), tl.float32)
        for first in range(0, d_model, chunk):
            part = first + tl.arange(0, chunk)
            in_row = part < d_model
            normed = tl.load(residual + start + part[None, :], mask=here[:, None] & in_row[None, :], other=0.0)
            normed = normed * inverse[:, None] * tl.load(norm + part, mask=in_row, other=0.0)[None, :]
            taught = tl.load(router_start + part[None, :], mask=is_expert[:, None] & in_row[None, :], other=0.0)
            # Not TF32: three digits would choose other experts.
            logit = tl.dot(normed, tl.trans(taught), acc=logit, input_precision="ieee")
    known = here[:, None] & is_expert[None, :]
    tl.store(logits + row.to(tl.int64)[:, None] * n_experts + expert[None, :], logit, mask=known)

    logit = tl.where(is_expert[None, :], logit, float("-inf"))
    shifted = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    left = shifted / tl.sum(shifted, axis=1)[:, None]  # probabilities; -1 once chosen
    left = tl.where(is_expert[None, :], left, -1.0)
    device = tl.arange(0, device_block)
    goes = tl.zeros((rows, device_block), tl.int32)
    total = tl.zeros((rows,), tl.float32)
    slot = row.to(tl.int64) * top_k
    for k in tl.static_range(top_k):
        best = tl.max(left, axis=1)
        chosen = tl.min(tl.where(left == best[:, None], expert[None, :], n_experts - 1), axis=1)
        left = tl.where(expert[None, :] == chosen[:, None], -1.0, left)
        total += best
        tl.store(experts + slot + k, chosen.to(tl.int64), mask=here)
        if not normalise:
            tl.store(weights + slot + k, best, mask=here)
        goes = tl.where(device[None, :] == tl.load(owner + chosen)[:, None], 1, goes)
    tl.store(used + row[:, None] * device_block + device[None, :], goes, mask=here[:, None])
    if normalise:
        # The choice once more, for its sum is only known now: cheaper than to keep it in registers.
        left = tl.where(is_expert[None, :], shifted / tl.sum(shifted, axis=1)[:, None], -1.0)
        for k in tl.static_range(top_k):
            best = tl.max(left, axis=1)
            chosen = tl.min(tl.where(left == best[:, None], expert[None, :], n_experts - 1), axis=1)
            left = tl.where(expert[None, :] == chosen[:, None], -1.0, left)
            tl.store(weights + slot + k, best / total, mask=here)


@triton.jit(do_not_specialize=["turn", "n_rows"])
def pack_kernel(
    hidden, used, packed, misfits, done, flag, turn, n_rows, d_model, n_devices,
    width_block: tl.constexpr, device_block: tl.constexpr, row_block: tl.constexpr,
):  # fmt: skip
    """Write a row, cast for the wire, to the host, once for each device that it goes to; one program for a row.

    The rows of a device lie together, ascending; the devices one after another.

    Args:
        hidden: [n, d_model] float32.
        used: [n, device_block] int32, whether the row goes to the device.
        packed: [pairs, d_model] float16 or float32, written to the host.
        misfits: [n] int32, written to the host: how many numbers of the row float16 does not hold; 0 is written for them.
        done: [1] int32, programs that have written; 0 before and after.
        flag: [1] int32, on the host, set to `turn` when all is written.
        turn: another number than the flag's.
        n_rows: n.
        d_model: width of a row.
        n_devices: how many there are.
        width_block: a power of two from d_model up.
        device_block: a power of two from the number of devices up.
        row_block: rows of `used` that are counted at once, a power of two.
    """
    row = tl.program_id(0)
    device = tl.arange(0, device_block)
    before = tl.zeros((device_block,), tl.int32)  # rows of the device before this one
    count = tl.zeros((device_block,), tl.int32)  # rows of the device
    for first in range(0, n_rows, row_block):
        other = first + tl.arange(0, row_block)
        goes = tl.load(used + other[:, None] * device_block + device[None, :], mask=(other < n_rows)[:, None], other=0)
        count += tl.sum(goes, axis=0)
        before += tl.sum(tl.where((other < row)[:, None], goes, 0), axis=0)
    place = before + tl.cumsum(count, axis=0) - count
    mine = tl.load(used + row * device_block + device)

    column = tl.arange(0, width_block)
    inside = column < d_model
    values = tl.load(hidden + row.to(tl.int64) * d_model + column, mask=inside, other=0.0)
    fits = tl.abs(values) < FLOAT16_END  # what is not a number does not
    tl.store(misfits + row, tl.sum(tl.where(fits, 0, 1), axis=0))
    if packed.dtype.element_ty == tl.float16:
        values = tl.where(fits, values, 0.0)
    cast = values.to(packed.dtype.element_ty)
    for k in range(n_devices):
        if tl.sum(tl.where(device == k, mine, 0), axis=0) != 0:
            at = tl.sum(tl.where(device == k, place, 0), axis=0)
            tl.store(packed + at.to(tl.int64) * d_model + column, cast, mask=inside)

    # All threads of this program have written; the count passes it on to whoever counts last, and it to the host.
    tl.debug_barrier()
    if tl.atomic_add(done, 1, sem="acq_rel", scope="sys") == n_rows - 1:
        tl.store(done, 0)
        tl.atomic_xchg(flag, turn, sem="release", scope="sys")


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def combine_kernel(
    sums, places, lost, shared, residual, norm, summed, normed,
    n_rows, d_model, n_parts, factor, epsilon,
    has_shared: tl.constexpr, width_block: tl.constexpr,
):  # fmt: skip
    """Add what the devices answered for a row to its residual, and norm it for what follows; one program for a row.

    Args:
        sums: [pairs, d_model] float32, on the host: the answers, one after another.
        places: [n_parts, n] int32, on the host: which of them is each row's; -1: none.
        lost: [n] float32, on the host: share of the token's gate weight that was skipped; what came is scaled up by it.
        shared: [n, d_model] float32, output of the shared expert; not read without one.
        residual: [n, d_model] float32.
        norm: [d_model] float32, weights of the norm that follows.
        summed: [n, d_model] float32, written: the next residual.
        normed: [n, d_model] float32, written.
        n_rows: n.
        d_model: width of a row.
        n_parts: how many answers there are; they are added in their order.
        factor: of what is added to the residual.
        epsilon: of the norm.
        has_shared: whether there is a shared expert.
        width_block: a power of two from d_model up.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * d_model
    column = tl.arange(0, width_block)
    inside = column < d_model
    total = tl.zeros((width_block,), tl.float32)
    for part in range(n_parts):
        at = tl.load(places + part * n_rows + row)
        if at >= 0:
            total += tl.load(sums + at.to(tl.int64) * d_model + column, mask=inside, other=0.0)
    share = tl.load(lost + row)
    came = share < 1 - 1e-6  # else everything was lost
    total = tl.where(came, total / tl.where(came, 1 - share, 1.0), 0.0)
    if has_shared:
        total += tl.load(shared + start + column, mask=inside, other=0.0)
    values = tl.load(residual + start + column, mask=inside, other=0.0) + total * factor
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / d_model + epsilon)
    scale = tl.load(norm + column, mask=inside, other=0.0)
    tl.store(summed + start + column, values, mask=inside)
    tl.store(normed + start + column, values * inverse * scale, mask=inside)
