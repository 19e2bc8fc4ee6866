"""Sequences of fixed shape: nothing is lost, doubled, cut in the middle or let over a limit."""

import collections
import dataclasses
import functools

import numpy as np
import pytest

from jvlm.data import packing
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.packing import Example
from tests.support import picture


def example(number, tokens, features):
    """A conversation of ``tokens`` tokens, the first of them media, each value naming the conversation."""
    features = min(features, tokens)
    ids = 1000 * number + np.arange(tokens, dtype=np.int32)
    frames = np.repeat(np.arange(1, 3), [2 * features, 2 * features])[: 4 * features].astype(np.int32)
    return Example(
        tokens=ids,
        positions=np.repeat(ids[:, None], 3, 1),
        loss_weights=np.ones(tokens, np.float32),
        turns=np.ones(tokens, np.int32),
        vision_index=np.where(np.arange(tokens) < features, np.arange(tokens), -1).astype(np.int32),
        media=(np.arange(tokens) < features).astype(np.int32),
        vision_segment_ids=frames[::4],
        patches=np.full((4 * features, 6), number, np.uint8),
        patch_segment_ids=frames,
        patch_window_ids=frames,
        patch_positions=np.zeros((4 * features, 2), np.int32),
        sizes=(((1, 1), (1, 1)),) * bool(features),
        origin=Origin("examples.jsonl", number),
    )


def random_examples(seed):
    rng = np.random.default_rng(seed)
    sizes = zip(rng.integers(1, 60, 40), rng.integers(0, 25, 40), strict=True)
    return [example(i + 1, int(t), int(f)) for i, (t, f) in enumerate(sizes)]


DRAWN = [functools.partial(packing.in_drawn_order, seed=1, small_last=small_last) for small_last in (False, True)]


@pytest.mark.parametrize("strategy", [packing.first_fit, packing.best_fit_decreasing, packing.one_by_one, *DRAWN])
@pytest.mark.parametrize("seed", range(5))
def test_sequences_hold_every_conversation_once_and_keep_both_limits(strategy, seed):
    examples = random_examples(seed)
    sequences = strategy(examples, 64, 112)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(examples)))
    for sequence in sequences:
        assert sum(examples[i].length for i in sequence) <= 64
        assert sum(examples[i].num_patches for i in sequence) <= 112


@pytest.mark.parametrize("strategy", [packing.first_fit, packing.best_fit_decreasing, *DRAWN])
@pytest.mark.parametrize("seed", range(5))
def test_no_two_sequences_could_have_been_one(strategy, seed):
    # the guarantee of any-fit packing: at most one sequence is half empty in both resources
    examples = random_examples(seed)
    sequences = strategy(examples, 64, 112)
    loads = [(sum(examples[i].length for i in r), sum(examples[i].num_patches for i in r)) for r in sequences]
    for a in range(len(sequences)):
        for b in range(a):
            assert loads[a][0] + loads[b][0] > 64 or loads[a][1] + loads[b][1] > 112


def test_a_mixed_set_fills_98_percent_of_the_tokens_though_images_and_texts_compete():
    """Sizes of drawn receipts, photos, lines and texts under Qwen2.5-VL; two receipts do not fit one sequence."""
    rng, Size = np.random.default_rng(0), collections.namedtuple("Size", "length num_patches")

    def drawn(kind):
        if kind == 0:
            return Size(int(rng.integers(1450, 1990)), int(rng.integers(3500, 4300)))
        if kind == 1:
            return Size(int(rng.integers(460, 477)), 1564)
        return Size(int(rng.integers(40, 50)), 36) if kind == 2 else Size(int(rng.integers(200, 3700)), 0)

    sizes = [drawn(kind) for kind in rng.choice(4, 2048, p=np.array([1, 2, 6, 3]) / 12)]
    sequences = packing.best_fit(sizes, 8192, 7680)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(2048))
    tokens = sum(size.length for size in sizes)
    assert tokens >= 0.98 * 8192 * len(sequences)
    assert tokens < 0.9 * 8192 * len(packing.best_fit_decreasing(sizes, 8192, 7680))  # what it is measured against


# (share, tokens from, to, patches of a token), as of real receipts, photos, lines, sentences; and of images without
# small examples beside them: screenshots, cells and tables too
REAL = {
    0.98: [(1, 1300, 3700, 1.6), (2, 130, 1280, 3.8), (6, 30, 77, 0.8), (3, 37, 48, 0.0)],
    0.97: [(1, 1300, 3700, 1.6), (1, 1036, 1079, 3.8), (1, 130, 1280, 3.8), (1, 440, 1058, 2.2), (2, 50, 640, 2.3)],
}


@pytest.mark.parametrize("share", REAL)
def test_sets_as_real_ones_fill_sequences(share):
    rng, Size = np.random.default_rng(0), collections.namedtuple("Size", "length num_patches")
    shares = np.array([one[0] for one in REAL[share]], float)
    drawn = [REAL[share][n] for n in rng.choice(len(shares), 4096, p=shares / shares.sum())]
    lengths = [int(rng.integers(low, high)) for _, low, high, _ in drawn]
    sizes = [Size(length, int(length * of[3])) for length, of in zip(lengths, drawn, strict=True)]
    patches = int(8192 * 1.1 * sum(size.num_patches for size in sizes) / sum(lengths))
    packed = [packing.best_fit(sizes[at : at + 2048], 8192, patches) for at in (0, 2048)]
    assert [sorted(i for sequence in one for i in sequence) for one in packed] == [list(range(2048))] * 2
    assert sum(lengths) >= share * 8192 * sum(map(len, packed))


def test_first_fit_keeps_the_order_within_a_row():
    for sequence in packing.first_fit(random_examples(0), 64, 112):
        assert sequence == sorted(sequence)


@pytest.mark.parametrize("seed", range(3))
def test_an_assembled_batch_gives_every_array_back(seed):
    examples = random_examples(seed)
    sequences = packing.first_fit(examples, 64, 112)
    batch = packing.assemble([[examples[i] for i in sequence] for sequence in sequences], 64, 112)
    assert batch.tokens.shape == (len(sequences), 64)
    assert batch.patches.shape == (len(sequences), 112, 6)
    for b, sequence in enumerate(sequences):
        patches = 0
        for number, index in enumerate(sequence, 1):
            one, inside = examples[index], batch.segment_ids[b] == number
            assert np.ptp(np.flatnonzero(inside)) + 1 == one.length, "segments must be contiguous"
            for name in ("tokens", "positions", "loss_weights"):
                np.testing.assert_array_equal(getattr(batch, name)[b, inside], getattr(one, name))
            fed = batch.vision_index[b, inside]
            features = batch.patches[b].reshape(-1, 4, 6)[fed[fed >= 0]]
            assert (features == one.origin.number).all(), "a token is fed by another conversation's patches"
            assert (fed >= 0).sum() == one.num_patches // 4
            patches += one.num_patches
        used = batch.patch_segment_ids[b] > 0
        assert used.sum() == patches
        assert used[:patches].all()
        frames = batch.patch_segment_ids[b, :patches]
        assert (np.diff(frames) >= 0).all()
        assert len(np.unique(frames)) == sum(len(np.unique(examples[i].patch_segment_ids)) for i in sequence)
    padding = batch.segment_ids == 0
    assert not batch.tokens[padding].any()
    assert not batch.loss_weights[padding].any()
    assert (batch.vision_index[padding] == -1).all()
    lost = batch.text_padding * batch.tokens.size
    assert lost == batch.tokens.size - sum(e.length for e in examples)


def test_a_conversation_too_big_for_a_sequence_is_refused_with_both_numbers():
    with pytest.raises(ExampleError, match=r"examples.jsonl, line 7, field 'messages': 65 tokens do not fit 64"):
        packing.check_fits(example(7, 65, 0), 64, 64)
    with pytest.raises(ExampleError, match=r"line 7, field 'messages': 33 tokens do not fit 32"):
        packing.check_fits(example(7, 33, 0), 64, 64, max_length=32)
    with pytest.raises(ExampleError, match=r"line 7, field 'images': 68 patches do not fit 64"):
        packing.check_fits(example(7, 20, 17), 64, 64)
    packing.check_fits(example(7, 64, 16), 64, 64)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 129, 200, 1000, 5000])
def test_buckets_hold_their_size_and_waste_less_than_half(size):
    found = packing.bucket(size, 64)
    assert found % 64 == 0
    assert size <= found < 2 * max(size, 64)
    units = found // 64
    assert units & (units - 1) == 0 or (units % 3 == 0 and (units // 3) & (units // 3 - 1) == 0)


TURNS = {
    "messages": [
        {"role": "user", "content": "<image>what is it?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "and <image><image>?"},
        {"role": "assistant", "content": "a dog", "loss": False},
        {"role": "user", "content": "and <image>?"},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ],
    "images": [picture(84, 84, i) for i in range(4)],
}


@pytest.fixture(scope="module")
def conversation(tiny):
    return tiny.processor.encode(TURNS)


def test_truncation_keeps_whole_turns_with_their_pictures(tiny, conversation):
    tokenizer = tiny.processor.tokenizer
    seen = set()
    for limit in range(1, conversation.length + 1):
        cut = packing.truncate(conversation, limit)
        if cut is None:
            assert tokenizer.decode(conversation.tokens[:limit]).count("<|im_end|>") < 3
            continue
        assert cut.length <= limit
        seen.add(cut.length)
        text = tokenizer.decode(cut.tokens)
        assert text.endswith("<|im_end|>")
        pictures = text.count("<|vision_start|>")
        assert text.count("<|vision_end|>") == pictures
        assert (cut.tokens == tiny.model.config.image_token_id).sum() == 9 * pictures
        assert cut.num_patches == 36 * pictures
        assert len(cut.sizes) == pictures
        assert sorted(cut.vision_index[cut.vision_index >= 0]) == list(range(9 * pictures))
        assert cut.loss_weights.sum() > 0
        for name in ("tokens", "positions", "loss_weights", "turns", "vision_index"):
            np.testing.assert_array_equal(getattr(cut, name), getattr(conversation, name)[: cut.length])
    # the turns that are learnt: the first, third and fourth
    assert len(seen) == 3


# fields of an example that say how it came about
CHANGED = ("made_to_fit", "breaks", "segments", "values")


def test_a_truncated_conversation_is_the_one_that_never_had_the_later_turns(tiny, conversation):
    shorter = {"messages": TURNS["messages"][:2], "images": TURNS["images"][:1]}
    expected = tiny.processor.encode(shorter)
    cut = packing.truncate(conversation, expected.length + 30)
    for field in dataclasses.fields(Example):
        if field.name not in (
            "sizes",
            "origin",
            "source",
            "records",
            "is_document",
            "made_to_fit",
            "breaks",
            "segments",
            "values",
        ):
            wanted = getattr(expected, field.name)
            # the template's line break after the last end token is no part of the turn
            wanted = wanted[: cut.length] if len(wanted) == expected.length else wanted
            np.testing.assert_array_equal(getattr(cut, field.name), wanted, err_msg=field.name)
    assert cut.sizes == expected.sizes


def test_packing_what_does_not_fit_or_is_nothing_says_so(tiny):
    with pytest.raises(ExampleError, match=r"tokens do not fit 32"):
        tiny.processor.pack([TURNS], seq_len=32)
    with pytest.raises(ExampleError, match=r"144 patches do not fit 64"):
        tiny.processor.pack([TURNS], seq_len=512, max_patches=64)
    with pytest.raises(ValueError, match="at least one conversation"):
        tiny.processor.pack([])


def test_pack_rounds_shapes_up_so_that_few_are_compiled(tiny):
    batch = tiny.processor.pack([TURNS])
    assert batch.tokens.shape[1] % 64 == 0
    assert batch.patches.shape[1] % 256 == 0
    text = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    assert tiny.processor.pack([text]).patches.shape[1] == 0
