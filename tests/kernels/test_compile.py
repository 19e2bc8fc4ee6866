"""The kernels pass the compilers of the devices that this machine does not have."""

import json

import jax
import jax.numpy as jnp
import pytest
from jvlm_kernels import decode_attention, segment_attention
from jvlm_kernels.platforms import compiling_for

from tests.support import with_compiler

MIB = 1 << 20
SOME = ("decoder, 8k", "windows", "decoding, rows")
# TPU topology -> which calls
TOPOLOGIES = {"v5e:2x2": SOME, "v5p:2x2x1": (), "v6e:2x2": (), "tpu7x:2x2x1": ()}
# GPU -> its matrix instruction; bytes that a thread's registers may be short of (the blocks are Hopper's); which calls
GPUS = {"a100": ("mma.sync", 4096, SOME), "h200": ("wgmma.mma_async", 0, ()), "b200": ("tcgen05.mma", 256, SOME)}


def _compiled(device: str, compiler: str, calls: str = "") -> dict[str, dict]:
    """What tools/compile_kernels.py says of each call, by name; the compilers lie where `make test` puts them."""
    command = ("tools/compile_kernels.py", device, "--ours", "--json", "--calls", calls)
    result = with_compiler(compiler, *command)
    assert result.returncode == 0, result.stderr[-4000:]
    return {line["call"]: line for line in map(json.loads, result.stdout.splitlines())}


def _one_fast(names, fast):
    """The devices to compile for; all but one are of the second tier."""
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("topology", _one_fast(TOPOLOGIES, "v5e:2x2"))
def test_forward_and_backward_compile_for_tpu_at_real_shapes(topology):
    calls = TOPOLOGIES[topology]
    by_name = _compiled(topology, "tpu-compiler", "|".join(calls))
    assert len(by_name) == (len(calls) or 8)
    for line in by_name.values():
        # forward, gradient of queries, gradient of keys and values; decoding has no gradient
        assert line["kernels"] == (1 if line["kernel"] == "decode_attention" else 3), line
        assert 0 < line["vmem"] <= 32 * MIB, line  # the least that newer compilers reserve
    assert by_name["decoding, rows"]["temporary"] < 64 * MIB
    if not calls:
        # 32k x 32k scores of 32 heads would be 64 GiB even in bfloat16
        assert by_name["MiMo-VL decoder, 32k"]["temporary"] < 1024 * MIB


@pytest.mark.parametrize("gpu", _one_fast(GPUS, "a100"))
def test_forward_and_backward_compile_for_gpu_at_real_shapes(gpu):
    product, most_spilled, calls = GPUS[gpu]
    by_name = _compiled(gpu, "gpu-compiler", "|".join(calls))
    assert len(by_name) == (len(calls) or 8)
    attention = ["segment_attention_d_keys", "segment_attention_d_queries", "segment_attention_forward"]
    for line in by_name.values():
        decoding = line["kernel"] == "decode_attention"
        assert [kernel["name"] for kernel in line["code"]] == (["decode_attention"] if decoding else attention), line
        for kernel in line["code"]:
            assert kernel["spilled"] <= most_spilled, line
            assert decoding or product in kernel["products"], line
    assert by_name["Qwen ViT, windows"]["temporary"] < 128 * MIB  # no copy of it padded to heads of 128
    assert by_name["decoding, rows"]["temporary"] < 64 * MIB
    if not calls:
        assert by_name["MiMo-VL decoder, 32k"]["temporary"] < 1024 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(("device", "compiler"), [("v5p:2x2x1", "tpu-compiler"), ("h200", "gpu-compiler")])
def test_losses_compile_at_real_shapes_without_all_logits(device, compiler):
    """8,192 tokens of 4,096 against 151,936 words, whose logits take 4.6 GiB; the kernel's gradient in float32, 2.3."""
    result = with_compiler(compiler, "tools/compile_losses.py", device, "--json")
    assert result.returncode == 0, result.stderr[-4000:]
    found = {line["loss"]: line for line in map(json.loads, result.stdout.splitlines())}
    one = 2 * 8192 * 4096 * 151936 / 1e12
    # the blocks of both loops are all counted; words of the last block that begins early are computed twice
    for loss, products, most in (("summed", 3, 3072), ("each", 4, 1536), ("plain_logits", 3, 12288)):
        assert found[loss]["TFLOP"] / one == pytest.approx(products, rel=0.03), found
        assert found[loss]["temporary memory, MiB"] < most, found


@pytest.mark.slow
@pytest.mark.parametrize(("device", "compiler"), [("v5e:2x4", "tpu-compiler"), ("h200:1", "gpu-compiler")])
def test_programs_of_the_engine_compile_and_update_the_cache_in_place(device, compiler):
    """Prefill, decoding of several tokens with their draws, copies of pages; 64 sequences of 4,096 tokens."""
    result = with_compiler(compiler, "-m", "tests.kernels.engine_programs", device)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() == {"prefill", "draw", "copy"}
    for name, one in found.items():
        assert one["fits"], (name, one)
        assert one["temporary"] < one["cache"] / 2, (name, one)


def _shapes(S, heads, kv_heads, head_size, dtype=jnp.bfloat16):
    operands = [jax.ShapeDtypeStruct((1, S, h, head_size), dtype) for h in (heads, kv_heads, kv_heads)]
    return [*operands, jax.ShapeDtypeStruct((1, S), jnp.int32)]


def _kernels_for_cuda(function, *shapes) -> list[str]:
    """Names of the Triton kernels in the program exported for CUDA."""
    call = "__gpu$xla.gpu.triton"
    unstable = [jax.export.DisabledSafetyCheck.custom_call(call)]
    with compiling_for("cuda"):
        text = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unstable)(*shapes).mlir_module()
    assert call in text, "no Triton kernel in the program"
    found = ("segment_attention_forward", "segment_attention_d_queries", "segment_attention_d_keys", "decode_attention")
    return [name for name in found if f'name = "{name}"' in text]


@pytest.mark.parametrize(
    ("S", "heads", "kv_heads", "head_size", "causal"),
    [(8192, 32, 8, 128, True), (16384, 16, 16, 80, False), (4900, 16, 16, 72, False), (2048, 16, 4, 96, False)],
)
def test_forward_and_backward_lower_for_cuda(S, heads, kv_heads, head_size, causal):
    def total(q, k, v, ids):
        return segment_attention(q, k, v, ids, ids, causal=causal).astype(jnp.float32).sum()

    found = _kernels_for_cuda(jax.grad(total, (0, 1, 2)), *_shapes(S, heads, kv_heads, head_size))
    assert found == ["segment_attention_forward", "segment_attention_d_queries", "segment_attention_d_keys"]


@pytest.mark.parametrize("paged", [False, True])
def test_decoding_lowers_for_cuda(paged):
    rows, cache_len = (512, 64) if paged else (4, 8192)
    cache = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, 8, 128, cache_len), (rows, 8, cache_len, 128))]
    q = jax.ShapeDtypeStruct((4, 1, 32, 128), jnp.bfloat16)
    tables = [jax.ShapeDtypeStruct((4, 128), jnp.int32)] if paged else []

    def decode(q, keys, values, lengths, tables=None):
        return decode_attention(q, (keys, values), lengths, block_tables=tables)

    assert _kernels_for_cuda(decode, q, *cache, jax.ShapeDtypeStruct((4,), jnp.int32), *tables) == ["decode_attention"]


@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_natively_on_the_device_at_hand(head_size):
    """What the device gets by itself: a Pallas kernel on a GPU or TPU, where other tests see the interpreter's."""
    S = 512
    q, k, v = (jax.random.normal(jax.random.key(i), (2, S, h, head_size)) for i, h in enumerate((4, 2, 2)))
    ids = jnp.repeat(jnp.asarray([[1, 2, 3, 0]] * 2), jnp.asarray([100, 300, 87, 25]), axis=1)

    def total(q, k, v, name):
        return jnp.sin(segment_attention(q, k, v, ids, ids, causal=True, implementation=name)).sum()

    gradients = jax.jit(jax.grad(total, (0, 1, 2)), static_argnums=3)
    ours, theirs = (gradients(q, k, v, name) for name in (None, "reference"))
    for x, y in zip(ours, theirs, strict=True):
        assert jnp.abs(x - y).max() < 1e-3
