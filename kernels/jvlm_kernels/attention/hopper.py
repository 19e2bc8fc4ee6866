"""Segment attention on Hopper GPUs (H100, H200): Pallas (Mosaic GPU) kernels in the structure of FlashAttention-3.

A block of threads computes one line of visits (`jvlm_kernels.attention.blocks`) of one head. Its last warpgroup only
copies: it has the visited blocks brought into rings of buffers in shared memory, as far ahead as these reach. Two
others compute 64 rows of the line each: asynchronous matrix instructions (wgmma) that sum in registers, softmax in
base 2, weights handed to the next product in registers. In the forward pass they take turns, so that one's softmax and
the other's products overlap (arXiv 2407.08608). Blocks in which every pair is visible get no mask.

Gradients take two kernels, by lines of queries and of keys. For heads of more than 128 their sums do not fit the
registers of two warpgroups: `jvlm_kernels.attention.gpu` computes these, from the same output and logsumexp.

Shapes: B rows, N query blocks, M key blocks, D head size padded to a multiple of 16, R = 64 rows of a warpgroup.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jvlm_kernels import platforms, shapes
from jvlm_kernels.attention import blocks, gpu
from jvlm_kernels.attention.plan import PaddedPlan, check_dtypes, normalisers, padded_ids
from jvlm_kernels.attention.tuning import Blocks
from jvlm_kernels.errors import Unavailable

PLATFORM = "cuda"
_ROWS, _COMPUTING = 64, 2
LINE = _ROWS * _COMPUTING
_STAGES = 2
# of a thread's registers, 512 for the three warpgroups together
_REGISTERS_TO_COPY, _REGISTERS_TO_COMPUTE = 24, 240
_SHARED_BYTES = 227 * 1024
_LARGEST_HEAD, _LARGEST_HEAD_BACK = 256, 128
_LOWEST = -1e20
_SHORT = 256
_LOG2E = math.log2(math.e)
_LAYOUT = plgpu.Layout.WGMMA
_BY_ROW, _BY_COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)


def check(spec, q, k, v) -> None:
    """Static reasons not to run."""
    check_dtypes(q, k, v, jnp.bfloat16, jnp.float16)
    if q.shape[-1] > _LARGEST_HEAD:
        raise Unavailable(f"a head of {q.shape[-1]} does not fit shared memory; at most {_LARGEST_HEAD}")
    if spec.scale <= 0:
        raise Unavailable(f"the largest score is found before scaling, so the scale must be positive, not {spec.scale}")
    if not spec.interpret and jax.default_backend() == "gpu":
        _check_device(jax.devices()[0])
    sizes = _sizes(spec, q)
    if sizes.q != LINE or sizes.kv % _ROWS or not 0 < sizes.kv <= 4 * _ROWS:
        raise Unavailable(f"blocks are of {LINE} queries and 64, 128, 192 or 256 keys, not {sizes}")
    plan = _Plan.of(spec, q, k, sizes)
    needed = 2 * plan.head * (LINE + 2 * _STAGES * plan.block_kv) + 4 * (2 * LINE + _STAGES * plan.block_kv) + 4096
    if needed > _SHARED_BYTES:
        raise Unavailable(f"{sizes} need {needed} bytes of shared memory, there are {_SHARED_BYTES}")


def check_automatic(spec, q, k, v) -> None:
    """Leave to `jvlm_kernels.attention.gpu` what is not Hopper's, or no faster here: docs/results has the table."""
    if platforms.compute_capability() != "9.0":
        raise Unavailable("chosen by itself for compute capability 9.0 (Hopper) alone")
    if _reach(spec, q) <= _SHORT:
        raise Unavailable(f"not faster where segments are promised to be at most {_SHORT} long")
    if q.shape[-1] > _LARGEST_HEAD_BACK:
        raise Unavailable(f"not measured for heads of more than {_LARGEST_HEAD_BACK}")


def _check_device(device) -> None:
    """The instructions are Hopper's alone. JAX refuses causal masks in its own kernel of this structure with CUDA 12.8
    and 12.9, whose assembler miscompiles them; what masks these kernels has not been tried with them.
    """
    if device.compute_capability != "9.0":
        raise Unavailable(f"made for compute capability 9.0 (Hopper), the device has {device.compute_capability}")
    toolkit = re.search(r"cuda (\d+)", device.client.platform_version)
    if toolkit and 12080 <= int(toolkit[1]) < 13000:
        raise Unavailable(f"CUDA {toolkit[1]} is between 12.8 and 12.9, known to miscompile masks: install JAX for 13")


def _sizes(spec, q) -> Blocks:
    """Queries and keys of a block in the forward pass, by rule."""
    return spec.blocks or Blocks(LINE, 64 if q.shape[-1] > _LARGEST_HEAD_BACK or _reach(spec, q) <= _SHORT else 128)


def _reach(spec, q) -> int:
    """How far a query sees at most."""
    return min(r for r in (spec.window, spec.max_segment_length, q.shape[1]) if r is not None)


class _Plan(PaddedPlan):
    """Sizes of a call, and the layout that the kernels want."""

    @property
    def head(self) -> int:
        """The head size that a block has."""
        return -(-self.D // 16) * 16

    def matrices(self, number: int, length: int, dtype):
        """Shared memory for ``number`` blocks [length, D], laid out as the matrix instructions read it."""
        swizzle = plgpu.find_swizzle(8 * jnp.dtype(dtype).itemsize * self.head)
        tile = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM((number, length, self.head), dtype, transforms=(tile, plgpu.SwizzleTransform(swizzle)))


class _Ring(NamedTuple):
    """Buffers filled together, one set for each stage: the copies arrive at ``here``, their readers at ``done``."""

    buffers: tuple
    here: plgpu.Barrier
    done: plgpu.Barrier

    @classmethod
    def of(cls, *buffers):
        """The memory to ask for."""
        here = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=_STAGES)
        return cls(buffers, here, plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=_STAGES))


def _slot(step):
    return lax.rem(step, jnp.int32(_STAGES))


def _copy(count, rings, sources) -> None:
    """The copying warpgroup: ``sources(step)`` are, for each ring, the arrays' parts that its buffers get."""
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


def _fetch(parts, buffers, barrier) -> None:
    """Copy what a computing warpgroup needs throughout, and wait for it."""
    for part, buffer in zip(parts, buffers, strict=True):
        plgpu.copy_gmem_to_smem(part, buffer, barrier)
    plgpu.barrier_wait(barrier)


def _arrivals(number: int) -> plgpu.Barrier:
    """One for each computing warpgroup, passed when ``number`` copies have arrived."""
    return plgpu.Barrier(num_arrivals=number, num_barriers=_COMPUTING)


def _columns(row, width: int):
    """[R] as [R, width]."""
    return lax.broadcast_in_dim(row, (row.shape[0], width), [0])


def _lines(column, height: int):
    """[width] as [height, width]."""
    return lax.broadcast_in_dim(column, (height, column.shape[0]), [1])


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _LAYOUT if len(shape) == 2 else _BY_ROW)


def _transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0))


def _add(sums, a, b):
    """sums + a @ b, for ``a`` in registers."""

    def compute(ref):
        ref[...] = sums
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(compute, plgpu.ACC(sums.shape))


def _hidden(spec, item, scores, row_ids, column_ids, first, rows_are_queries: bool = True):
    """Scores with those of pairs that are not visible at -inf.

    Args:
      column_ids: gives the ids of the columns, if they are needed.
      first: place of the first row, counted from the first column.
    """
    back = None if spec.window is None else spec.window - 1
    ahead = 0 if spec.causal else back
    least, most = (back, ahead) if rows_are_queries else (ahead, back)

    def hide(scores):
        mask = _columns(row_ids, scores.shape[1]) == _lines(column_ids(), scores.shape[0])
        rows, columns = (plgpu.broadcasted_iota(jnp.int32, scores.shape, n, layout=_LAYOUT) for n in (0, 1))
        # of a column's number a thread knows the last bits and the program the others: a comparison costs no addition
        known = columns & ~6
        place = rows + first - (columns & 6)
        if most is not None:
            mask &= known <= place + most
        if least is not None:
            mask &= known >= place - least
        return jnp.where(mask, scores, -jnp.inf)

    return lax.cond(blocks.is_full(item), lambda scores: scores, hide, scores)


def _forward_kernel(spec, plan: _Plan, items, starts, offsets, q, k, v, q_ids, kv_ids, out, lse, *scratch):
    mine, arrived, keys, values, turn = scratch
    row, i, head, group = (lax.axis_index(name) for name in ("rows", "lines", "heads", "warpgroups"))
    first, last = starts[row * plan.N + i], starts[row * plan.N + i + 1]

    @pl.when(group == _COMPUTING)
    def copy():
        def sources(step):
            places = pl.ds(blocks.partner_of(items[first + step]) * plan.block_kv, plan.block_kv)
            block = row, places, lax.div(head, jnp.int32(plan.G))
            return (k.at[block], kv_ids.at[row, places]), (v.at[block],)

        _copy(last - first, (keys, values), sources)

    @pl.when(group < _COMPUTING)
    def compute():
        plgpu.set_max_registers(_REGISTERS_TO_COMPUTE, action="increase")
        place = i * plan.block_q + group * _ROWS
        rows = pl.ds(place, _ROWS)
        queries, ids, logsumexp = (buffer.at[group] for buffer in mine)
        _fetch((q.at[row, rows, head], q_ids.at[row, rows]), (queries, ids), arrived.at[group])
        row_ids = plgpu.load(ids, (), layout=_BY_ROW)
        place += offsets[row]
        scale = spec.scale * _LOG2E

        def meet():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        (key_block, id_block), (value_block,) = keys.buffers, values.buffers

        def soften(item, slot, scores, top, total):
            """(largest score, sum of weights, what earlier ones shrink by, weights) with one more block."""
            column_ids = functools.partial(plgpu.load, id_block, slot, layout=_BY_COLUMN)
            from_keys = place - blocks.partner_of(item) * plan.block_kv
            scores = _hidden(spec, item, scores, row_ids, column_ids, from_keys)
            plgpu.barrier_arrive(keys.done.at[slot])
            now = jnp.maximum(top, scores.max(1) * scale)
            weights = jnp.exp2(scores * scale - _columns(now, plan.block_kv))
            shrink = jnp.exp2(top - now)
            # all of it before the wait that follows, here and (for a wait is a loop) in the assembler's order
            return lax.optimization_barrier((now, total * shrink + weights.sum(1), shrink, weights))

        def begin(ref):
            plgpu.wgmma(ref, queries, _transposed(key_block.at[0]))
            meet()
            return ref[...]

        def step(visit, carry):
            top, total, sums, halves = carry
            item, slot, before = items[visit], _slot(visit - first), _slot(visit - first - 1)
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(keys.here.at[slot])
            plgpu.barrier_wait(turn)

            def compute(scores, ref):
                plgpu.wgmma(scores, queries, _transposed(key_block.at[slot]))
                ref[...] = sums
                plgpu.wgmma(ref, halves, value_block.at[before])
                meet()  # the products are under way: the other's may follow
                softened = soften(item, slot, plgpu.wgmma_accumulator_load(scores, wait_n=1), top, total)
                plgpu.barrier_wait(values.here.at[slot])
                return *softened, ref[...]

            square, wide = plgpu.ACC((_ROWS, plan.block_kv)), plgpu.ACC((_ROWS, plan.head))
            softened = pl.run_scoped(compute, square, wide)
            plgpu.barrier_arrive(values.done.at[before])
            # the weights of before are in use until here, so these must not be rounded into their place any earlier
            now, total, shrink, weights, sums = lax.optimization_barrier(softened)
            return now, total, sums * _columns(shrink, plan.head), weights.astype(v.dtype)

        pl.when(group == 1)(meet)
        plgpu.barrier_wait(keys.here.at[0])
        scores = pl.run_scoped(begin, plgpu.ACC((_ROWS, plan.block_kv)))
        top, total, _, weights = soften(items[first], 0, scores, _zeros(_ROWS) + _LOWEST, _zeros(_ROWS))
        plgpu.barrier_wait(values.here.at[0])
        start = top, total, _zeros(_ROWS, plan.head), weights.astype(v.dtype)
        top, total, sums, halves = lax.fori_loop(first + 1, last, step, start)
        pl.when(group == 0)(meet)
        slot = _slot(last - first - 1)
        sums = _add(sums, halves, value_block.at[slot])
        plgpu.barrier_arrive(values.done.at[slot])
        seen = total > 0
        divisor = jnp.where(seen, total, 1.0)
        queries[...] = (sums * _columns(1.0 / divisor, plan.head)).astype(out.dtype)
        logsumexp[...] = jnp.where(seen, top / _LOG2E + jnp.log(divisor), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, out.at[row, rows, head])
        plgpu.copy_smem_to_gmem(logsumexp, lse.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)


def _both_products(scores, d_weights, a, b, c, d):
    """Begin scores a @ b.T and the weights' gradients c @ d.T, and wait for the scores."""
    plgpu.wgmma(scores, a, _transposed(b))
    plgpu.wgmma(d_weights, c, _transposed(d))
    return plgpu.wgmma_accumulator_load(scores, wait_n=1)


def _d_queries_kernel(spec, plan: _Plan, items, starts, offsets, *operands):
    q, k, v, d_out, lse, delta, q_ids, kv_ids, d_q, mine, arrived, keys = operands
    row, i, head, group = (lax.axis_index(name) for name in ("rows", "lines", "heads", "warpgroups"))
    first, last = starts[row * plan.N + i], starts[row * plan.N + i + 1]

    @pl.when(group == _COMPUTING)
    def copy():
        def sources(step):
            places = pl.ds(blocks.partner_of(items[first + step]) * plan.block_kv, plan.block_kv)
            block = row, places, lax.div(head, jnp.int32(plan.G))
            return ((k.at[block], v.at[block], kv_ids.at[row, places]),)

        _copy(last - first, (keys,), sources)

    @pl.when(group < _COMPUTING)
    def compute():
        plgpu.set_max_registers(_REGISTERS_TO_COMPUTE, action="increase")
        place = i * plan.block_q + group * _ROWS
        rows = pl.ds(place, _ROWS)
        buffers = [buffer.at[group] for buffer in mine]
        block, sums = (row, rows, head), (row, head, rows)
        parts = q.at[block], d_out.at[block], lse.at[sums], delta.at[sums], q_ids.at[row, rows]
        _fetch(parts, buffers, arrived.at[group])
        queries, d_outs = buffers[:2]
        lses, deltas, row_ids = (plgpu.load(buffer, (), layout=_BY_ROW) for buffer in buffers[2:])
        place += offsets[row]
        scale = spec.scale * _LOG2E

        def step(n, sums):
            item, slot = items[first + n], _slot(n)
            plgpu.barrier_wait(keys.here.at[slot])
            key_block, value_block, ids = (buffer.at[slot] for buffer in keys.buffers)
            column_ids = functools.partial(plgpu.load, ids, (), layout=_BY_COLUMN)
            from_keys = place - blocks.partner_of(item) * plan.block_kv

            def compute(scores, d_weights, total):
                scores = _both_products(scores, d_weights, queries, key_block, d_outs, value_block)
                scores = _hidden(spec, item, scores, row_ids, column_ids, from_keys)
                weights = jnp.exp2(scores * scale - _columns(lses, plan.block_kv))
                d_scores = weights * (d_weights[...] - _columns(deltas, plan.block_kv))
                total[...] = sums
                plgpu.wgmma(total, d_scores.astype(k.dtype), key_block)
                return total[...]

            square, wide = plgpu.ACC((_ROWS, plan.block_kv)), plgpu.ACC((_ROWS, plan.head))
            sums = pl.run_scoped(compute, square, square, wide)
            plgpu.barrier_arrive(keys.done.at[slot])
            return sums

        found = lax.fori_loop(0, last - first, step, _zeros(_ROWS, plan.head))
        queries[...] = (found * spec.scale).astype(d_q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, d_q.at[block])
        plgpu.wait_smem_to_gmem(0)


def _d_keys_kernel(spec, plan: _Plan, items, starts, offsets, *operands):
    q, k, v, d_out, lse, delta, q_ids, kv_ids, d_k, d_v, mine, arrived, queries = operands
    row, j, head, group = (lax.axis_index(name) for name in ("rows", "lines", "heads", "warpgroups"))
    first = starts[row * plan.M + j]
    visits = starts[row * plan.M + j + 1] - first

    @pl.when(group == _COMPUTING)
    def copy():
        def sources(step):
            places = pl.ds(blocks.partner_of(items[first + lax.rem(step, visits)]) * plan.block_q, plan.block_q)
            h = head * plan.G + lax.div(step, visits)
            block, sums = (row, places, h), (row, h, places)
            return ((q.at[block], d_out.at[block], lse.at[sums], delta.at[sums], q_ids.at[row, places]),)

        _copy(plan.G * visits, (queries,), sources)

    @pl.when(group < _COMPUTING)
    def compute():
        plgpu.set_max_registers(_REGISTERS_TO_COMPUTE, action="increase")
        place = j * plan.block_kv + group * _ROWS
        rows = pl.ds(place, _ROWS)
        block = row, rows, head
        keys, values, ids = (buffer.at[group] for buffer in mine)
        _fetch((k.at[block], v.at[block], kv_ids.at[row, rows]), (keys, values, ids), arrived.at[group])
        row_ids = plgpu.load(ids, (), layout=_BY_ROW)
        scale = spec.scale * _LOG2E

        def step(n, carry):
            sums_k, sums_v = carry
            item, slot = items[first + lax.rem(n, visits)], _slot(n)
            plgpu.barrier_wait(queries.here.at[slot])
            query_block, d_outs, lses, deltas, ids = (buffer.at[slot] for buffer in queries.buffers)
            column_ids = functools.partial(plgpu.load, ids, (), layout=_BY_COLUMN)
            from_queries = place - blocks.partner_of(item) * plan.block_q - offsets[row]

            def columns(vector):
                return _lines(plgpu.load(vector, (), layout=_BY_COLUMN), _ROWS)

            def compute(scores, d_weights, total_k, total_v):
                scores = _both_products(scores, d_weights, keys, query_block, values, d_outs)
                scores = _hidden(spec, item, scores, row_ids, column_ids, from_queries, rows_are_queries=False)
                weights = jnp.exp2(scores * scale - columns(lses))
                total_v[...] = sums_v
                plgpu.wgmma(total_v, weights.astype(q.dtype), d_outs)
                d_scores = weights * (plgpu.wgmma_accumulator_load(d_weights, wait_n=1) - columns(deltas))
                total_k[...] = sums_k
                plgpu.wgmma(total_k, d_scores.astype(q.dtype), query_block)
                return total_k[...], total_v[...]

            square, wide = plgpu.ACC((_ROWS, plan.block_q)), plgpu.ACC((_ROWS, plan.head))
            sums = pl.run_scoped(compute, square, square, wide, wide)
            plgpu.barrier_arrive(queries.done.at[slot])
            return sums

        start = _zeros(_ROWS, plan.head), _zeros(_ROWS, plan.head)
        sums_k, sums_v = lax.fori_loop(0, plan.G * visits, step, start)
        keys[...] = (sums_k * spec.scale).astype(d_k.dtype)
        values[...] = sums_v.astype(d_v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(keys, d_k.at[block])
        plgpu.copy_smem_to_gmem(values, d_v.at[block])
        plgpu.wait_smem_to_gmem(0)


def _call(kernel, spec, plan: _Plan, name: str, grid, visits, offsets, operands, outputs, scratch):
    """Launch over ``grid`` (rows, heads, lines), neighbouring lines together; ``outputs`` are (shape, dtype)."""
    operands = visits.items, visits.starts, offsets, *operands
    launch = plgpu.kernel(
        functools.partial(kernel, spec, plan),
        out_type=[shapes.result(shape, dtype, operands) for shape, dtype in outputs],
        scratch_types=scratch,
        grid=grid,
        grid_names=("rows", "heads", "lines"),
        num_threads=_COMPUTING + 1,
        thread_name="warpgroups",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if spec.interpret else None,
    )
    return shapes.marked_varying(launch(*operands), operands)


def _interpreter():
    """JAX's, which looks for races too; private, and without what tests/kernels/mosaic_interpreter.py adds."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def _prepare(spec, plan: _Plan, q_segments, kv_segments, offsets):
    """Ids in whole blocks, and the blocks to visit."""
    q_ids, kv_ids = padded_ids(q_segments, kv_segments, plan.N * plan.block_q, plan.M * plan.block_kv)
    return q_ids, kv_ids, plan.visited(spec, q_segments, kv_segments, offsets)


def forward(spec, q, k, v, q_segments, kv_segments, offsets):
    """(out [B, S, H, D], logsumexp [B, S, H])."""
    plan = _Plan.of(spec, q, k, _sizes(spec, q))
    q_ids, kv_ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    length = plan.N * plan.block_q
    mine = (
        plan.matrices(_COMPUTING, _ROWS, q.dtype),
        plgpu.SMEM((_COMPUTING, _ROWS), jnp.int32),
        plgpu.SMEM((_COMPUTING, _ROWS), jnp.float32),
    )
    block = plan.matrices(_STAGES, plan.block_kv, k.dtype)
    out, lse = _call(
        _forward_kernel,
        spec,
        plan,
        "segment_attention_forward",
        (plan.B, plan.H, plan.N),
        blocks.list_visits(*found, plan.visits, fill=True),
        offsets,
        (plan.queries(q), plan.keys(k), plan.keys(v), q_ids, kv_ids),
        [((plan.B, length, plan.H, plan.head), q.dtype), ((plan.B, plan.H, length), jnp.float32)],
        [
            mine,
            _arrivals(2),
            _Ring.of(block, plgpu.SMEM((_STAGES, plan.block_kv), jnp.int32)),
            _Ring.of(block),
            plgpu.Barrier(num_arrivals=_COMPUTING),
        ],
    )
    return out[:, : plan.S, :, : plan.D], lse[..., : plan.S].swapaxes(1, 2)


def backward(spec, q, k, v, q_segments, kv_segments, offsets, out, logsumexp, d_out, d_logsumexp):
    """(dq, dk, dv) from what the forward pass left."""
    inputs = q, k, v, q_segments, kv_segments, offsets
    if q.shape[-1] > _LARGEST_HEAD_BACK:
        return gpu.backward(dataclasses.replace(spec, blocks=None), *inputs, out, logsumexp, d_out, d_logsumexp)
    lse, delta = normalisers(out, logsumexp, d_out, d_logsumexp, -_LOWEST)
    sums = lse * _LOG2E, delta
    return _d_queries(spec, *inputs, d_out, sums), *_d_keys(spec, *inputs, d_out, sums)


def _operands(plan: _Plan, q, k, v, d_out, sums, ids):
    heads_first = [plan.queries(x).swapaxes(1, 2) for x in sums]
    return plan.queries(q), plan.keys(k), plan.keys(v), plan.queries(d_out.astype(q.dtype)), *heads_first, *ids


def _d_queries(spec, q, k, v, q_segments, kv_segments, offsets, d_out, sums):
    plan = _Plan.of(spec, q, k, Blocks(LINE, _ROWS))
    *ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    vector, numbers = (plgpu.SMEM((_COMPUTING, _ROWS), dtype) for dtype in (jnp.float32, jnp.int32))
    matrix = plan.matrices(_COMPUTING, _ROWS, q.dtype)
    block = plan.matrices(_STAGES, plan.block_kv, k.dtype)
    (d_q,) = _call(
        _d_queries_kernel,
        spec,
        plan,
        "segment_attention_d_queries",
        (plan.B, plan.H, plan.N),
        blocks.list_visits(*found, plan.visits, fill=False),
        offsets,
        _operands(plan, q, k, v, d_out, sums, ids),
        [((plan.B, plan.N * plan.block_q, plan.H, plan.head), q.dtype)],
        [
            (matrix, matrix, vector, vector, numbers),
            _arrivals(5),
            _Ring.of(block, block, plgpu.SMEM((_STAGES, plan.block_kv), jnp.int32)),
        ],
    )
    return d_q[:, : plan.S, :, : plan.D]


def _d_keys(spec, q, k, v, q_segments, kv_segments, offsets, d_out, sums):
    plan = _Plan.of(spec, q, k, Blocks(_ROWS, LINE))
    *ids, found = _prepare(spec, plan, q_segments, kv_segments, offsets)
    matrix = plan.matrices(_COMPUTING, _ROWS, k.dtype)
    block = plan.matrices(_STAGES, plan.block_q, q.dtype)
    vector, numbers = (plgpu.SMEM((_STAGES, plan.block_q), dtype) for dtype in (jnp.float32, jnp.int32))
    found = _call(
        _d_keys_kernel,
        spec,
        plan,
        "segment_attention_d_keys",
        (plan.B, plan.K, plan.M),
        blocks.list_visits(*blocks.transposed(found), plan.visits, fill=False),
        offsets,
        _operands(plan, q, k, v, d_out, sums, ids),
        [((plan.B, plan.M * plan.block_kv, plan.K, plan.head), x.dtype) for x in (k, v)],
        [
            (matrix, matrix, plgpu.SMEM((_COMPUTING, _ROWS), jnp.int32)),
            _arrivals(3),
            _Ring.of(block, block, vector, vector, numbers),
        ],
    )
    return [x[:, : plan.T, :, : plan.D] for x in found]
