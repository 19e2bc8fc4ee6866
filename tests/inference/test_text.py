"""Ids to text, piece by piece."""

import numpy as np
import pytest

from jvlm.inference.text import TextStream

TEXTS = ["what is in the picture?", "naïve café, 三棵树", "👩‍👩‍👧‍👦 and 🌲🌳", " leading and trailing  ", "\n\n\t"]


def pieces(processor, ids):
    text = TextStream(processor)
    return [*(text.add(int(i)) for i in ids), text.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_up_to_the_text_and_hold_whole_characters(tiny, text):
    ids = tiny.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tiny.processor, ids)
    assert "".join(found) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


def test_text_is_given_as_soon_as_it_is_whole(tiny):
    ids = tiny.processor.tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert pieces(tiny.processor, ids)[0] == "a"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_ids_join_up_to_their_text(tiny, seed):
    ids = np.random.default_rng(seed).integers(0, len(tiny.processor.tokenizer), 60)
    assert "".join(pieces(tiny.processor, ids)) == tiny.processor.decode(ids)
