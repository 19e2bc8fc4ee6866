"""The rivals of the kernel benchmark compute the same thing, and what cannot run is listed with the reason."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tools import bench_kernels, bench_torch


@pytest.mark.parametrize(("segment", "causal"), [(None, True), (512, True), (64, False)])
def test_jax_and_torch_compute_what_segment_attention_does(segment, causal):
    case = bench_kernels.Case(640, (4, 2, 16), "float32", segment, backward=False, causal=causal)
    qkv, ids = case.operands()
    ours = bench_kernels.ours(case)(*qkv, ids)
    np.testing.assert_allclose(bench_kernels.xla(case)(*qkv, ids), ours, atol=2e-5)
    theirs = bench_torch.sdpa(case)(*(torch.from_numpy(np.array(x)).to(bench_torch.DEVICE) for x in qkv)).transpose(
        1, 2
    )
    np.testing.assert_allclose(theirs.cpu(), ours, atol=2e-5)


def test_losses_agree():
    hidden, kernel, targets = np.random.rand(8, 4), np.random.rand(4, 16), np.arange(8)
    targets[3] = -100
    plain = bench_torch.plain_logits(*map(torch.from_numpy, (hidden, kernel, targets)))
    for ours in (bench_kernels.summed, bench_kernels.each, bench_kernels.plain_logits):
        found = ours(jnp.float32(hidden), jnp.float32(kernel), jnp.asarray(targets))
        assert float(found) == pytest.approx(float(plain), rel=1e-5)


def test_operations_count_visible_pairs_alone():
    dense = bench_kernels.Case(1024, (4, 2, 16), "float32", None, backward=False)
    packed = bench_kernels.Case(1024, (4, 2, 16), "float32", 512, backward=True)
    windows = bench_kernels.Case(1024, (4, 2, 16), "float32", 64, backward=False, causal=False)
    assert windows.operations == 4 * 16 * 64**2 * 4 * 16
    assert dense.operations == 4 * (1024 * 1025 / 2) * 4 * 16
    assert packed.operations == 3.5 * 4 * 2 * (512 * 513 / 2) * 4 * 16


def test_a_rival_that_cannot_run_is_listed_with_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(bench_torch, "DEVICE", "cpu")
    case = bench_kernels.Case(64, (4, 2, 16), "float32", 512, backward=True)
    bench_kernels.attention([case], rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| 1.00 |")
    assert "does not run: torch has it on GPUs alone" in lines[-1]
