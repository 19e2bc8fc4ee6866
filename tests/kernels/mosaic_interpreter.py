"""What JAX's interpreter of Mosaic GPU kernels lacks and our kernels use, for tests.

JAX 0.10.2 interprets threads, barriers, copies and matrix instructions, but not: layouts of registers, loads that name
one, accumulators that begin with values, and matrix instructions with an operand in registers. All of it is private to
JAX; where it has moved, `extended` fails with an AttributeError or ImportError that names what is missing.
"""

from __future__ import annotations

import contextlib
import threading
import types
from unittest import mock

import jax
import numpy as np
from jax._src import callback
from jax._src import core as jax_core
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import thread_map, utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, jaxpr_interpret, shared_memory
from jax._src.state.indexing import NDIndexer
from jax._src.state.types import AbstractRef, TransposeTransform

_NAMELESS = jax_core.DebugInfo("one instruction", "mosaic_interpreter.py", None, None)


class _Interpreter(jaxpr_interpret.JaxprInterpreter):
    """Hands each instruction that JAX knows to JAX, one at a time, so that effects keep the program's order."""

    def interpret(self, jaxpr, token, *args):
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

        def read(x):
            return x.val if isinstance(x, jax_core.Literal) else values[x]

        for eqn in jaxpr.eqns:
            if eqn.primitive is primitives.load_p:
                token, out = self._load(eqn, token, *map(read, eqn.invars))
            elif eqn.primitive is primitives.wgmma_accumulator_store_p:
                token, out = self._call(_store, eqn, token, *map(read, eqn.invars))
            elif eqn.primitive is primitives.wgmma_ref_p:
                token, out = self._call(_multiply, eqn, token, *map(read, eqn.invars))
            else:
                free = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, jax_core.Literal)))
                alone = jaxpr.replace(constvars=[], invars=free, outvars=eqn.outvars, eqns=[eqn], debug_info=_NAMELESS)
                token, out = super().interpret(alone, token, *map(read, free))
            values.update(zip(eqn.outvars, out, strict=True))
        return token, [read(x) for x in jaxpr.outvars]

    def _load(self, eqn, token, key, *leaves):
        token, found = gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=eqn.outvars[0].aval,
            device_id=jax.numpy.int32(self.device_info.device_id),
            grid_point_coords=self.grid_point_coords,
            thread_id=self.thread_id,
            allocation_key_as_array=key,
            transforms=jax.tree.unflatten(eqn.params["tree"], leaves),
            source_info=eqn.source_info,
        )
        return token, [found]

    def _call(self, function, eqn, token, key, value, *rest):
        """``function(eqn, memory, key, value, ...)`` on the host, where the token has come to."""

        def on_host(token, device, thread, key, value, rest):
            memory = _Memory(int(device), int(thread), eqn.source_info)
            function(eqn, memory, gpu_callbacks.HostAllocationKey.from_array(key), np.asarray(value), *rest)
            return token

        shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
        operands = token, self.device_info.device_id, self.thread_id, key, value, rest
        return callback.io_callback(on_host, shape, *operands), [None] * len(eqn.outvars)


class _Memory:
    """Buffers of the interpreter as one thread sees them."""

    def __init__(self, device: int, thread: int, source_info) -> None:
        self.device, self.thread, self.source_info = device, thread, source_info
        self.memory = gpu_callbacks._get_shared_memory()
        self.number = self.memory.get_global_thread_id(device, thread)
        self.information = utils.GPULoggingInfo(
            device_id=device, grid_point_coords=(), thread_id=thread, source_info=source_info
        )

    def read(self, key, place=()):
        found, _, clock = self.memory.get_buffer_content(key, place, self.number, logging_info=self.information)
        if self.memory.detect_races:
            races = gpu_callbacks.get_races()
            races.check_read(self.device, self.thread, clock, key, place, source_info=self.source_info)
        return found

    def part(self, key, transforms):
        """A buffer that is indexed and transposed, however it lies in shared memory."""
        indexers = [jax.tree.map(int, t) for t in transforms if isinstance(t, NDIndexer)]
        found = self.read(gpu_callbacks.HostAllocationKey.from_array(key), utils.to_range(indexers))
        for transform in transforms:
            if isinstance(transform, TransposeTransform):
                found = found.transpose(transform.permutation)
        return found

    def write(self, key, value) -> None:
        self.memory.store_buffer_content(key, (), value, self.number, logging_info=self.information)


def _store(eqn, memory: _Memory, key, value) -> None:
    memory.write(key, value)


def _multiply(eqn, memory: _Memory, key, left, right, *leaves) -> None:
    """The accumulator at ``key`` plus left @ right; ``left`` is an array, or like ``right`` the key of a buffer."""
    trees = [eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([]) for name in ("acc", "a", "b")]
    into, *transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    assert not into, "products into a part of an accumulator are not needed"
    is_buffer = isinstance(eqn.invars[1].aval, AbstractRef), True
    factors = [
        memory.part(x, how) if buffer else x
        for x, how, buffer in zip((left, right), transforms, is_buffer, strict=True)
    ]
    left, right = (x.astype(np.float32) for x in factors)
    memory.write(key, memory.read(key) + left @ right)


class _Programs:
    """Compiles each kernel once, where JAX compiles it for every thread of every block.

    A program whose operands are ready runs in the thread that calls it, any other in a pool of as many threads as the
    machine has cores: there, programs that wait for each other could fill the pool and wait for ever.
    """

    def __init__(self) -> None:
        self.lock, self.compiled = threading.Lock(), {}

    def run(self, jaxpr, consts, *args) -> None:
        with self.lock:
            if jaxpr not in self.compiled:
                evaluate = jax.jit(lambda *operands: jax_core.eval_jaxpr(jaxpr, *operands) and None)
                self.compiled[jaxpr] = evaluate.lower(consts, *args).compile()
        try:
            self.compiled[jaxpr](*jax.block_until_ready((consts, *args)))
            if gpu_callbacks.get_races().races_found:
                raise AssertionError("threads of a kernel race for a buffer; what is printed above says for which")
        except Exception:
            _let_all_go()
            raise


def _let_all_go() -> None:
    """A thread has failed: those that wait for it must not wait for ever."""
    for found in list(gpu_callbacks._get_shared_memory().mem.values()):
        if isinstance(found, shared_memory.Barrier):
            with found.cv:
                found.phase = 1 << 30
                found.cv.notify_all()


def _in_any_order(*args, ordered: bool = False, **options):
    """JAX's io_callback without its order, an operand that may not be ready: the interpreter's token orders enough."""
    return callback.io_callback(*args, **options)


@contextlib.contextmanager
def extended():
    """Kernels traced and run inside get what the interpreter lacks; a race between their threads is an error."""
    mlir.register_lowering(gpu_core.layout_cast_p, mlir.lower_fun(lambda x, new_layout: x, multiple_results=False))
    with (
        mock.patch.object(jaxpr_interpret, "JaxprInterpreter", _Interpreter),
        mock.patch.object(jaxpr_interpret, "callback", types.SimpleNamespace(io_callback=_in_any_order)),
        mock.patch.object(thread_map, "_run_jaxpr", _Programs().run),
    ):
        try:
            yield
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()
