"""`tools/kernel_work.py` counts what one counts by hand."""

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from tools import kernel_work


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "blocks", "pairs"), [(True, 4, 9), (False, 5, 13)])
def test_ideal_counts_of_a_tiny_row_are_those_counted_by_hand(causal, blocks, pairs):
    row = np.array([1, 1, 2, 2, 2, 0])
    assert kernel_work.ideal_blocks(row, causal=causal, block_q=2, block_kv=2) == blocks
    assert kernel_work.visible_scores(row, causal=causal) == pairs


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block_q", "block_kv"), [(8, 8), (4, 16), (16, 4)])
def test_ideal_blocks_are_those_of_the_whole_mask(causal, block_q, block_kv):
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 30, 6)
        row = np.pad(np.repeat(np.arange(1, 7), lengths), (0, 192 - lengths.sum()))
        mask = (row[:, None] == row) & (row > 0)
        mask = np.tril(mask) if causal else mask
        ideal = mask.reshape(192 // block_q, block_q, 192 // block_kv, block_kv).any((1, 3)).sum()
        assert kernel_work.ideal_blocks(row, causal=causal, block_q=block_q, block_kv=block_kv) == ideal
        assert kernel_work.visible_scores(row, causal=causal) == mask.sum()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 128), (128, 256), (256, 128)])
def test_splash_blocks_are_those_that_its_own_mask_keeps(causal, block_q, block_kv):
    S = 1024
    mask = masks.CausalMask((S, S)) if causal else masks.FullMask((S, S))
    info, _ = mask_info.process_mask(masks.MultiHeadMask([mask]), (block_q, block_kv))
    ours = kernel_work.splash_blocks(S, causal=causal, block_q=block_q, block_kv=block_kv)
    # Without a list of kept blocks, every block is computed.
    kept = S // block_q * (S // block_kv) if info.block_mask is None else (np.asarray(info.block_mask) > 0).sum()
    assert ours == kept


@pytest.mark.slow
def test_a_segment_in_two_parts_is_refused():
    with pytest.raises(ValueError, match="two parts"):
        kernel_work.visible_scores(np.array([1, 2, 1]), causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_on_the_demos_sequences_computed_blocks_are_at_most_15_percent_above_ideal(demo, platform):
    works = list(kernel_work.measure(demo, platform))
    assert [w.attention for w in works] == ["decoder", "ViT, windows", "ViT, images"]
    for work in works:
        assert work.sequences > 0
        assert 1 <= work.excess <= 1.15, work
    assert kernel_work.table(works).count("\n| demo |") == 3


@pytest.fixture(scope="module")
def demo():
    return kernel_work.demo_sequences(batches=4)
