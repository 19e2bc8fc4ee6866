"""Segment attention on Hopper GPUs (H100, H200): Pallas (Mosaic GPU) kernels in the structure of FlashAttention-3.

A thread block computes one block row of one head (`jvlm_kernels.attention.block_pairs`). Its last warpgroup only
copies: it fetches the needed block columns into ring buffers in shared memory, as far ahead as these reach. The other
two compute 64 rows of the block row each: asynchronous matrix instructions (wgmma) that accumulate in registers,
softmax in base 2, weights handed to the next product in registers. In the forward pass they take turns, so that the
softmax of one and the products of the other overlap (arXiv 2407.08608). Full pairs get no mask.

Gradients take two kernels, by block rows of queries and of keys. For heads of more than 128 their accumulators do not
fit the registers of two warpgroups: `jvlm_kernels.attention.gpu` computes these, from the same output and logsumexp.

Shapes: B batch rows, N query blocks, M key blocks, D head size padded to a multiple of 16, R = 64 rows of a warpgroup.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jvlm_kernels import platforms, shapes
from jvlm_kernels.attention import block_pairs, gpu
from jvlm_kernels.attention.block_plan import PaddedBlockPlan, check_dtypes, logsumexp_and_delta, padded_segment_ids
from jvlm_kernels.attention.tuning import BlockSizes
from jvlm_kernels.constants import LOG2E, NEG_INF
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_GROUP_ROWS, _COMPUTE_GROUPS = 64, 2
BLOCK_ROWS = _GROUP_ROWS * _COMPUTE_GROUPS
_STAGES = 2
# registers of a thread; the three warpgroups have 512 together
_REGISTERS_TO_COPY, _REGISTERS_TO_COMPUTE = 24, 240
_SHARED_BYTES = 227 * 1024
_MAX_HEAD_SIZE, _MAX_GRADIENT_HEAD_SIZE = 256, 128
_MAX_SHORT_REACH = 256
_LAYOUT = plgpu.Layout.WGMMA
_BY_ROW, _BY_COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)


def check(spec, q, k, v) -> None:
    """Raise `Unavailable` for a call that the kernels cannot run."""
    check_dtypes(q, k, v, jnp.bfloat16, jnp.float16)
    if q.shape[-1] > _MAX_HEAD_SIZE:
        raise Unavailable(f"a head of {q.shape[-1]} does not fit shared memory; at most {_MAX_HEAD_SIZE}")
    if spec.scale <= 0:
        raise Unavailable(f"the maximum is taken before scaling, so the scale must be positive, not {spec.scale}")
    if not spec.interpret and jax.default_backend() == "gpu":
        _check_device(jax.devices()[0])
    sizes = _sizes(spec, q)
    if sizes.q != BLOCK_ROWS or sizes.kv % _GROUP_ROWS or not 0 < sizes.kv <= 4 * _GROUP_ROWS:
        raise Unavailable(f"blocks are of {BLOCK_ROWS} queries and 64, 128, 192 or 256 keys, not {sizes}")
    plan = _HopperPlan.of(spec, q, k, sizes)
    needed = (
        2 * plan.head * (BLOCK_ROWS + 2 * _STAGES * plan.block_kv)
        + 4 * (2 * BLOCK_ROWS + _STAGES * plan.block_kv)
        + 4096
    )
    if needed > _SHARED_BYTES:
        raise Unavailable(f"{sizes} need {needed} bytes of shared memory, there are {_SHARED_BYTES}")


def check_automatic(spec, q, k, v) -> None:
    """Raise `Unavailable` where `pallas_gpu` is as fast or nothing was measured; docs/results/gpu.md has the table."""
    if platforms.compute_capability() != "9.0":
        raise Unavailable("chosen automatically only for compute capability 9.0 (Hopper)")
    if _reach(spec, q) <= _MAX_SHORT_REACH:
        raise Unavailable(f"not faster where segments are promised to be at most {_MAX_SHORT_REACH} long")
    if q.shape[-1] > _MAX_GRADIENT_HEAD_SIZE:
        raise Unavailable(f"not measured for heads of more than {_MAX_GRADIENT_HEAD_SIZE}")


def _check_device(device) -> None:
    """Raise `Unavailable` unless the device is a Hopper GPU with a CUDA version that compiles masks correctly.

    JAX refuses causal masks in its own kernel of this structure with CUDA 12.8 and 12.9, whose assembler miscompiles
    them. The masks of these kernels have not been tried with those versions.
    """
    if device.compute_capability != "9.0":
        raise Unavailable(f"made for compute capability 9.0 (Hopper), the device has {device.compute_capability}")
    toolkit = re.search(r"cuda (\d+)", device.client.platform_version)
    if toolkit and 12080 <= int(toolkit[1]) < 13000:
        raise Unavailable(f"CUDA {toolkit[1]} is 12.8 or 12.9, which miscompile masks; install JAX for CUDA 13")


def _sizes(spec, q) -> BlockSizes:
    """Return the block sizes of the forward pass, as the call asks or by rule."""
    return spec.block_sizes or BlockSizes(
        BLOCK_ROWS, 64 if q.shape[-1] > _MAX_GRADIENT_HEAD_SIZE or _reach(spec, q) <= _MAX_SHORT_REACH else 128
    )


def _reach(spec, q) -> int:
    """Return an upper bound on the distance between a query and a key that it attends to."""
    return min(r for r in (spec.window, spec.max_segment_length, q.shape[1]) if r is not None)


class _HopperPlan(PaddedBlockPlan):
    """Sizes of a call, and the layout of the kernels' operands."""

    @property
    def head(self) -> int:
        """Head size after padding."""
        return -(-self.D // 16) * 16

    def buffers(self, count: int, length: int, dtype):
        """Return shared memory for ``count`` blocks [length, D], laid out as the matrix instructions read it."""
        swizzle = plgpu.find_swizzle(8 * jnp.dtype(dtype).itemsize * self.head)
        tile = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM((count, length, self.head), dtype, transforms=(tile, plgpu.SwizzleTransform(swizzle)))


class _Ring(NamedTuple):
    """A ring of buffers, one set for each stage.

    Attributes:
      buffers: filled together in each stage.
      here: barrier of a stage that the copies arrive at.
      done: barrier of a stage that the readers arrive at.
    """

    buffers: tuple
    here: plgpu.Barrier
    done: plgpu.Barrier

    @classmethod
    def of(cls, *buffers):
        """Return the scratch types of a ring with these buffers."""
        here = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=_STAGES)
        return cls(buffers, here, plgpu.Barrier(num_arrivals=_COMPUTE_GROUPS, num_barriers=_STAGES))


def _slot(step):
    return lax.rem(step, jnp.int32(_STAGES))


def _copy(count, rings, sources) -> None:
    """Run the copying warpgroup; ``sources(step)`` gives, for each ring, the slices that its buffers get."""
    plgpu.set_max_registers(_REGISTERS_TO_COPY, action="decrease")

    @pl.loop(0, count)
    def fill(step):
        slot = _slot(step)
        for ring, parts in zip(rings, sources(step), strict=True):
            pl.when(step >= _STAGES)(functools.partial(plgpu.barrier_wait, ring.done.at[slot]))
            for part, buffer in zip(parts, ring.buffers, strict=True):
                plgpu.copy_gmem_to_smem(part, buffer.at[slot], ring.here.at[slot])

    @pl.loop(lax.max(count - _STAGES, 0), count)
    def finish(step):
        for ring in rings:
            plgpu.barrier_wait(ring.done.at[_slot(step)])


def _load_resident(parts, buffers, barrier) -> None:
    """Copy what a computing warpgroup needs in every step, and wait for it."""
    for part, buffer in zip(parts, buffers, strict=True):
        plgpu.copy_gmem_to_smem(part, buffer, barrier)
    plgpu.barrier_wait(barrier)


def _block_row(spec, plan: _HopperPlan):
    """Return the block row of queries of a thread block: the longest rows first, so that none is left at the end."""
    row = lax.axis_index("block_rows")
    return plan.N - 1 - row if spec.causal else row


def _arrivals(copies: int) -> plgpu.Barrier:
    """Return one barrier for each computing warpgroup, passed when this many copies have arrived."""
    return plgpu.Barrier(num_arrivals=copies, num_barriers=_COMPUTE_GROUPS)


def _across_columns(vector, width: int):
    """Broadcast [R] to [R, width]."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), [0])


def _across_rows(vector, height: int):
    """Broadcast [width] to [height, width]."""
    return lax.broadcast_in_dim(vector, (height, vector.shape[0]), [1])


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _LAYOUT if len(shape) == 2 else _BY_ROW)


def _transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0))


def _add(acc, a, b):
    """Return acc + a @ b, for ``a`` in registers."""

    def compute(ref):
        ref[...] = acc
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(compute, plgpu.ACC(acc.shape))


def _mask_scores(spec, item, scores, row_ids, column_ids, first, rows_are_queries: bool = True):
    """Return the scores with -inf where they are masked out; full pairs are returned as they are.

    Args:
      column_ids: returns the segment ids of the columns; called for partial pairs only.
      first: index of the first row, counted from the first column.
    """
    back = None if spec.window is None else spec.window - 1
    ahead = 0 if spec.causal else back
    least, most = (back, ahead) if rows_are_queries else (ahead, back)

    def apply_mask(scores):
        mask = _across_columns(row_ids, scores.shape[1]) == _across_rows(column_ids(), scores.shape[0])
        rows, columns = (plgpu.broadcasted_iota(jnp.int32, scores.shape, n, layout=_LAYOUT) for n in (0, 1))
        # a thread knows the last bits of a column's number, the program the others: a comparison costs no addition
        known = columns & ~6
        distance = rows + first - (columns & 6)
        if most is not None:
            mask &= known <= distance + most
        if least is not None:
            mask &= known >= distance - least
        return jnp.where(mask, scores, -jnp.inf)

    return lax.cond(block_pairs.is_full(item), lambda scores: scores, apply_mask, scores)


def _forward_kernel(spec, plan: _HopperPlan, items, starts, offsets, q, k, v, q_ids, kv_ids, out, lse, *scratch):
    resident, arrived, keys, values, turn = scratch
    batch_row, head, group = (lax.axis_index(name) for name in ("batch_rows", "heads", "warpgroups"))
    i = _block_row(spec, plan)
    first, last = starts[batch_row * plan.N + i], starts[batch_row * plan.N + i + 1]

    @pl.when(group == _COMPUTE_GROUPS)
    def copy():
        def sources(step):
            columns = pl.ds(block_pairs.block_column(items[first + step]) * plan.block_kv, plan.block_kv)
            block = batch_row, columns, lax.div(head, jnp.int32(plan.G))
            return (k.at[block], kv_ids.at[batch_row, columns]), (v.at[block],)

        _copy(last - first, (keys, values), sources)

    @pl.when(group < _COMPUTE_GROUPS)
    def compute():
        plgpu.set_max_registers(_REGISTERS_TO_COMPUTE, action="increase")
        row_start = i * plan.block_q + group * _GROUP_ROWS
        rows = pl.ds(row_start, _GROUP_ROWS)
        queries, ids, logsumexp = (buffer.at[group] for buffer in resident)
        _load_resident((q.at[batch_row, rows, head], q_ids.at[batch_row, rows]), (queries, ids), arrived.at[group])
        row_ids = plgpu.load(ids, (), layout=_BY_ROW)
        row_start += offsets[batch_row]
        scale = spec.scale * LOG2E

        def switch_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        (key_block, id_block), (value_block,) = keys.buffers, values.buffers

        def online_softmax(item, slot, scores, running_max, running_sum):
            """Return (running max, running sum, rescaling of the accumulator, weights) after one more block of keys."""
            column_ids = functools.partial(plgpu.load, id_block, slot, layout=_BY_COLUMN)
            from_keys = row_start - block_pairs.block_column(item) * plan.block_kv
            scores = _mask_scores(spec, item, scores, row_ids, column_ids, from_keys)
            plgpu.barrier_arrive(keys.done.at[slot])
            new_max = jnp.maximum(running_max, scores.max(1) * scale)
            weights = jnp.exp2(scores * scale - _across_columns(new_max, plan.block_kv))
            rescale = jnp.exp2(running_max - new_max)
            # all of this must precede the wait that follows, also in the assembler's order (a wait is a loop)
            return lax.optimization_barrier((new_max, running_sum * rescale + weights.sum(1), rescale, weights))

        def begin(ref):
            plgpu.wgmma(ref, queries, _transposed(key_block.at[0]))
            switch_turns()
            return ref[...]

        def step(index, carry):
            running_max, running_sum, acc, weights_16 = carry
            item, slot, before = items[index], _slot(index - first), _slot(index - first - 1)
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(keys.here.at[slot])
            plgpu.barrier_wait(turn)

            def compute(scores, ref):
                plgpu.wgmma(scores, queries, _transposed(key_block.at[slot]))
                ref[...] = acc
                plgpu.wgmma(ref, weights_16, value_block.at[before])
                switch_turns()  # the products have started: those of the other warpgroup may follow
                updated = online_softmax(
                    item, slot, plgpu.wgmma_accumulator_load(scores, wait_n=1), running_max, running_sum
                )
                plgpu.barrier_wait(values.here.at[slot])
                return *updated, ref[...]

            square, wide = plgpu.ACC((_GROUP_ROWS, plan.block_kv)), plgpu.ACC((_GROUP_ROWS, plan.head))
            updated = pl.run_scoped(compute, square, wide)
            plgpu.barrier_arrive(values.done.at[before])
            # the previous weights are in use until here: the new ones must not be rounded into their registers before
            new_max, running_sum, rescale, weights, acc = lax.optimization_barrier(updated)
            return new_max, running_sum, acc * _across_columns(rescale, plan.head), weights.astype(v.dtype)

        pl.when(group == 1)(switch_turns)
        plgpu.barrier_wait(keys.here.at[0])
        scores = pl.run_scoped(begin, plgpu.ACC((_GROUP_ROWS, plan.block_kv)))
        running_max, running_sum, _, weights = online_softmax(
            items[first], 0, scores, _zeros(_GROUP_ROWS) + NEG_INF, _zeros(_GROUP_ROWS)
        )
        plgpu.barrier_wait(values.here.at[0])
        start = running_max, running_sum, _zeros(_GROUP_ROWS, plan.head), weights.astype(v.dtype)
        running_max, running_sum, acc, weights_16 = lax.fori_loop(first + 1, last, step, start)
        pl.when(group == 0)(switch_turns)
        slot = _slot(last - first - 1)
        acc = _add(acc, weights_16, value_block.at[slot])
        plgpu.barrier_arrive(values.done.at[slot])
        attends = running_sum > 0
        divisor = jnp.where(attends, running_sum, 1.0)
        queries[...] = (acc * _across_columns(1.0 / divisor, plan.head)).astype(out.dtype)
        logsumexp[...] = jnp.where(attends, running_max / LOG2E + jnp.log(divisor), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, out.at[batch_row, rows, head])
        plgpu.copy_smem_to_gmem(logsumexp, lse.at[batch_row, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _both_products(scores, d_weights, a, b, c, d):
    """Start the scores a @ b.T and the gradients of the weights c @ d.T, and wait for the scores."""
    plgpu.wgmma(scores, a, _transposed(b))
    plgpu.wgmma(d_weights, c, _transposed(d))
    return plgpu.wgmma_accumulator_load(scores, wait_n=1)


def _d_queries_kernel(spec, plan: _HopperPlan, items, starts, offsets, *operands):
    q, k, v, d_out, lse, delta, q_ids, kv_ids, d_q, resident, arrived, keys = operands
    batch_row, head, group = (lax.axis_index(name) for name in ("batch_rows", "heads", "warpgroups"))
    i = _block_row(spec, plan)
    first, last = starts[batch_row * plan.N + i], starts[batch_row * plan.N + i + 1]

    @pl.when(group == _COMPUTE_GROUPS)
    def copy():
        def sources(step):
            columns = pl.ds(block_pairs.block_column(items[first + step]) * plan.block_kv, plan.block_kv)
            block = batch_row, columns, lax.div(head, jnp.int32(plan.G))
            return ((k.at[block], v.at[block], kv_ids.at[batch_row, columns]),)

        _copy(last - first, (keys,), sources)

    @pl.when(group < _COMPUTE_GROUPS)
    def compute():
        plgpu.set_max_registers(_REGISTERS_TO_COMPUTE, action="increase")
        row_start = i * plan.block_q + group * _GROUP_ROWS
        rows = pl.ds(row_start, _GROUP_ROWS)
        buffers = [buffer.at[group] for buffer in resident]
        block, statistics = (batch_row, rows, head), (batch_row, head, rows)
        parts = q.at[block], d_out.at[block], lse.at[statistics], delta.at[statistics], q_ids.at[batch_row, rows]
        _load_resident(parts, buffers, arrived.at[group])
        queries, d_outs = buffers[:2]
        lses, deltas, row_ids = (plgpu.load(buffer, (), layout=_BY_ROW) for buffer in buffers[2:])
        row_start += offsets[batch_row]
        scale = spec.scale * LOG2E

        def step(n, acc):
            item, slot = items[first + n], _slot(n)
            plgpu.barrier_wait(keys.here.at[slot])
            key_block, value_block, ids = (buffer.at[slot] for buffer in keys.buffers)
            column_ids = functools.partial(plgpu.load, ids, (), layout=_BY_COLUMN)
            from_keys = row_start - block_pairs.block_column(item) * plan.block_kv

            def compute(scores, d_weights, total):
                scores = _both_products(scores, d_weights, queries, key_block, d_outs, value_block)
                scores = _mask_scores(spec, item, scores, row_ids, column_ids, from_keys)
                weights = jnp.exp2(scores * scale - _across_columns(lses, plan.block_kv))
                d_scores = weights * (d_weights[...] - _across_columns(deltas, plan.block_kv))
                total[...] = acc
                plgpu.wgmma(total, d_scores.astype(k.dtype), key_block)
                return total[...]

            square, wide = plgpu.ACC((_GROUP_ROWS, plan.block_kv)), plgpu.ACC((_GROUP_ROWS, plan.head))
            acc = pl.run_scoped(compute, square, square, wide)
            plgpu.barrier_arrive(keys.done.at[slot])
            return acc

        acc = lax.fori_loop(0, last - first, step, _zeros(_GROUP_ROWS, plan.head))
        queries[...] = (acc * spec.scale).astype(d_q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, d_q.at[block])
        plgpu.wait_smem_to_gmem(0)


def _d_keys_kernel(spec, plan: _HopperPlan, items, starts, offsets, *operands):
    q, k, v, d_out, lse, delta, q_ids, kv_ids, d_k, d_v, resident, arrived, queries = operands
    batch_row, j, head, group = (lax.axis_index(name) for name in ("batch_rows", "block_rows", "heads", "warpgroups"))
    first = starts[batch_row * plan.M + j]
    count = starts[batch_row * plan.M + j + 1] - first

    @pl.when(group == _COMPUTE_GROUPS)
    def copy():
        def sources(step):
            columns = pl.ds(block_pairs.block_column(items[first + lax.rem(step, count)]) * plan.block_q, plan.block_q)
            h = head * plan.G + lax.div(step, count)
            block, statistics = (batch_row, columns, h), (batch_row, h, columns)
            return (
                (q.at[block], d_out.at[block], lse.at[statistics], delta.at[statistics], q_ids.at[batch_row, columns]),
            )

        _copy(plan.G * count, (queries,), sources)

    @pl.when(group < _COMPUTE_GROUPS)
    def compute():
        plgpu.set_max_registers(_REGISTERS_TO_COMPUTE, action="increase")
        row_start = j * plan.block_kv + group * _GROUP_ROWS
        rows = pl.ds(row_start, _GROUP_ROWS)
        block = batch_row, rows, head
        keys, values, ids = (buffer.at[group] for buffer in resident)
        _load_resident((k.at[block], v.at[block], kv_ids.at[batch_row, rows]), (keys, values, ids), arrived.at[group])
        row_ids = plgpu.load(ids, (), layout=_BY_ROW)
        scale = spec.scale * LOG2E

        def step(n, carry):
            acc_k, acc_v = carry
            item, slot = items[first + lax.rem(n, count)], _slot(n)
            plgpu.barrier_wait(queries.here.at[slot])
            query_block, d_outs, lses, deltas, ids = (buffer.at[slot] for buffer in queries.buffers)
            column_ids = functools.partial(plgpu.load, ids, (), layout=_BY_COLUMN)
            from_queries = row_start - block_pairs.block_column(item) * plan.block_q - offsets[batch_row]

            def across(vector):
                return _across_rows(plgpu.load(vector, (), layout=_BY_COLUMN), _GROUP_ROWS)

            def compute(scores, d_weights, total_k, total_v):
                scores = _both_products(scores, d_weights, keys, query_block, values, d_outs)
                scores = _mask_scores(spec, item, scores, row_ids, column_ids, from_queries, rows_are_queries=False)
                weights = jnp.exp2(scores * scale - across(lses))
                total_v[...] = acc_v
                plgpu.wgmma(total_v, weights.astype(q.dtype), d_outs)
                d_scores = weights * (plgpu.wgmma_accumulator_load(d_weights, wait_n=1) - across(deltas))
                total_k[...] = acc_k
                plgpu.wgmma(total_k, d_scores.astype(q.dtype), query_block)
                return total_k[...], total_v[...]

            square, wide = plgpu.ACC((_GROUP_ROWS, plan.block_q)), plgpu.ACC((_GROUP_ROWS, plan.head))
            acc = pl.run_scoped(compute, square, square, wide, wide)
            plgpu.barrier_arrive(queries.done.at[slot])
            return acc

        start = _zeros(_GROUP_ROWS, plan.head), _zeros(_GROUP_ROWS, plan.head)
        acc_k, acc_v = lax.fori_loop(0, plan.G * count, step, start)
        keys[...] = (acc_k * spec.scale).astype(d_k.dtype)
        values[...] = acc_v.astype(d_v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(keys, d_k.at[block])
        plgpu.copy_smem_to_gmem(values, d_v.at[block])
        plgpu.wait_smem_to_gmem(0)


def _call(kernel, spec, plan: _HopperPlan, name: str, grid, pairs, offsets, operands, outputs, scratch):
    """Launch over ``grid`` (batch rows, block rows, heads), the last the fastest; ``outputs`` are (shape, dtype).

    All heads of a block row start before the next row does. Causal rows are of unequal length: with a head after the
    other, the long rows of the last head would start when the rest is about to end.
    """
    operands = pairs.items, pairs.starts, offsets, *operands
    launch = plgpu.kernel(
        functools.partial(kernel, spec, plan),
        out_type=[shapes.result_type(shape, dtype, operands) for shape, dtype in outputs],
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch_rows", "block_rows", "heads"),
        num_threads=_COMPUTE_GROUPS + 1,
        thread_name="warpgroups",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if spec.interpret else None,
    )
    return shapes.mark_varying_like(launch(*operands), operands)


def _interpreter():
    """Return the parameters of JAX's interpreter with its race detector; private to JAX.

    tests/kernels/mosaic_interpreter.py adds what JAX 0.10.2 lacks.
    """
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def _prepare(spec, plan: _HopperPlan, q_segments, kv_segments, offsets):
    """Return segment ids padded to whole blocks, and the block mask."""
    q_ids, kv_ids = padded_segment_ids(q_segments, kv_segments, plan.N * plan.block_q, plan.M * plan.block_kv)
    return q_ids, kv_ids, plan.block_mask(spec, q_segments, kv_segments, offsets)


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """Return (out [B, S, H, D], logsumexp [B, S, H])."""
    plan = _HopperPlan.of(spec, q, k, _sizes(spec, q))
    q_ids, kv_ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    length = plan.N * plan.block_q
    resident = (
        plan.buffers(_COMPUTE_GROUPS, _GROUP_ROWS, q.dtype),
        plgpu.SMEM((_COMPUTE_GROUPS, _GROUP_ROWS), jnp.int32),
        plgpu.SMEM((_COMPUTE_GROUPS, _GROUP_ROWS), jnp.float32),
    )
    block = plan.buffers(_STAGES, plan.block_kv, k.dtype)
    out, lse = _call(
        _forward_kernel,
        spec,
        plan,
        "segment_attention_forward",
        (plan.B, plan.N, plan.H),
        block_pairs.list_pairs(*mask, plan.max_pairs, cover_empty_rows=True),
        offsets,
        (plan.queries(q), plan.keys(k), plan.keys(v), q_ids, kv_ids),
        [((plan.B, length, plan.H, plan.head), q.dtype), ((plan.B, plan.H, length), jnp.float32)],
        [
            resident,
            _arrivals(2),
            _Ring.of(block, plgpu.SMEM((_STAGES, plan.block_kv), jnp.int32)),
            _Ring.of(block),
            plgpu.Barrier(num_arrivals=_COMPUTE_GROUPS),
        ],
    )
    return out[:, : plan.S, :, : plan.D], lse[..., : plan.S].swapaxes(1, 2)


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """Return (dq, dk, dv) from the residuals of the forward pass."""
    inputs = q, k, v, q_segments, kv_segments, offsets
    if q.shape[-1] > _MAX_GRADIENT_HEAD_SIZE:
        return gpu.backward(dataclasses.replace(spec, block_sizes=None), *inputs, out, logsumexp, d_out, d_logsumexp)
    lse, delta = logsumexp_and_delta(out, logsumexp, d_out, d_logsumexp, -NEG_INF)
    statistics = lse * LOG2E, delta
    return _d_queries(spec, *inputs, d_out, statistics), *_d_keys(spec, *inputs, d_out, statistics)


def _operands(plan: _HopperPlan, q, k, v, d_out, statistics, ids):
    heads_first = [plan.queries(x).swapaxes(1, 2) for x in statistics]
    return plan.queries(q), plan.keys(k), plan.keys(v), plan.queries(d_out.astype(q.dtype)), *heads_first, *ids


def _d_queries(spec, q, k, v, q_segments, kv_segments, offsets, d_out, statistics):
    plan = _HopperPlan.of(spec, q, k, BlockSizes(BLOCK_ROWS, _GROUP_ROWS))
    *ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    vector, numbers = (plgpu.SMEM((_COMPUTE_GROUPS, _GROUP_ROWS), dtype) for dtype in (jnp.float32, jnp.int32))
    matrix = plan.buffers(_COMPUTE_GROUPS, _GROUP_ROWS, q.dtype)
    block = plan.buffers(_STAGES, plan.block_kv, k.dtype)
    (d_q,) = _call(
        _d_queries_kernel,
        spec,
        plan,
        "segment_attention_d_queries",
        (plan.B, plan.N, plan.H),
        block_pairs.list_pairs(*mask, plan.max_pairs, cover_empty_rows=False),
        offsets,
        _operands(plan, q, k, v, d_out, statistics, ids),
        [((plan.B, plan.N * plan.block_q, plan.H, plan.head), q.dtype)],
        [
            (matrix, matrix, vector, vector, numbers),
            _arrivals(5),
            _Ring.of(block, block, plgpu.SMEM((_STAGES, plan.block_kv), jnp.int32)),
        ],
    )
    return d_q[:, : plan.S, :, : plan.D]


def _d_keys(spec, q, k, v, q_segments, kv_segments, offsets, d_out, statistics):
    plan = _HopperPlan.of(spec, q, k, BlockSizes(_GROUP_ROWS, BLOCK_ROWS))
    *ids, mask = _prepare(spec, plan, q_segments, kv_segments, offsets)
    matrix = plan.buffers(_COMPUTE_GROUPS, _GROUP_ROWS, k.dtype)
    block = plan.buffers(_STAGES, plan.block_q, q.dtype)
    vector, numbers = (plgpu.SMEM((_STAGES, plan.block_q), dtype) for dtype in (jnp.float32, jnp.int32))
    gradients = _call(
        _d_keys_kernel,
        spec,
        plan,
        "segment_attention_d_keys",
        (plan.B, plan.M, plan.K),
        block_pairs.list_pairs(*block_pairs.transpose(mask), plan.max_pairs, cover_empty_rows=False),
        offsets,
        _operands(plan, q, k, v, d_out, statistics, ids),
        [((plan.B, plan.M * plan.block_kv, plan.K, plan.head), x.dtype) for x in (k, v)],
        [
            (matrix, matrix, plgpu.SMEM((_COMPUTE_GROUPS, _GROUP_ROWS), jnp.int32)),
            _arrivals(3),
            _Ring.of(block, block, vector, vector, numbers),
        ],
    )
    return [x[:, : plan.T, :, : plan.D] for x in gradients]
