"""Ids to text, piece by piece: the pieces of any ids join up to the tokenizer's own decoding of all of them."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jvlm.inference.text import TextStream

TEXTS = ["what is in the picture?", "naïve café, 三棵树", "👩‍👩‍👧‍👦 and 🌲🌳", " leading and trailing  ", "\n\n\t"]
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = "▁ ▁▁ ▁a ▁the a b . , ' s n't 't ' ▁' ▁. ▁, ▁n 树 ▁фе flew bridge ▁bridge \ufffd é".split()
WORDS = list(dict.fromkeys(WORDS))


def wrapped(tokenizer, **options):
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"clean_up_tokenization_spaces": False} | names | options
    )


def sentencepiece(*steps, **options):
    """A vocabulary as SentencePiece makes them: spaces are ▁, and what is not in it is written as bytes."""
    vocabulary = {name: i for i, name in enumerate((*SPECIAL, *BYTES, *WORDS))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *steps]
    )
    return wrapped(tokenizer, **options)


def unigram(decoder, **options):
    vocabulary = [(name, -1.0) for name in (*SPECIAL, *BYTES, *WORDS)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.decoder = decoder
    return wrapped(tokenizer, **options)


def wordpiece(**options):
    words = "a b c d e n ' t s m . , ? ! ##a ##b ##. n't 's ve 'm the".split()
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate((*SPECIAL, *words))}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece("##", cleanup=False)
    return wrapped(tokenizer, **options)


def byte_level(**options):
    """Tokens of one byte, and pieces that begin and end within characters."""
    alphabet = {name: i for i, name in enumerate(sorted(decoders_alphabet()))}
    pieces = ["æł", "ĳ", "Ġthe", "Ġ.", "Ã©", "ðŁĮ", "Ġ'", "n't", "."]
    vocabulary = alphabet | {name: len(alphabet) + i for i, name in enumerate(p for p in pieces if p not in alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, **options)


def decoders_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


STRIP = decoders.Strip(" ", 1, 0)
CLEANED = {"clean_up_tokenization_spaces": True}
FORCED = {**CLEANED, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
TOKENIZERS = {
    "byte-level BPE": byte_level(),
    "byte-level BPE, cleaned": byte_level(**FORCED),
    "SentencePiece of Llama 2": sentencepiece(STRIP),
    "SentencePiece of Gemma": sentencepiece(),
    "SentencePiece, cleaned": sentencepiece(STRIP, **FORCED),
    "three spaces stripped": sentencepiece(decoders.Strip(" ", 3, 0)),
    "byte-level BPE, asked to clean": byte_level(**CLEANED),
    "Metaspace": unigram(decoders.Metaspace()),
    "no decoder's spaces": unigram(decoders.Fuse()),
    "WordPiece": wordpiece(),
    "WordPiece, cleaned": wordpiece(**CLEANED),
}


def pieces(processor, ids):
    text = TextStream(processor)
    return [*(text.add(int(i)) for i in ids), text.finish()]


def of(name):
    tokenizer = TOKENIZERS[name]
    return SimpleNamespace(
        tokenizer=tokenizer, decode=lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pieces_of_any_ids_join_up_to_their_text(name, data):
    processor = of(name)
    size = len(processor.tokenizer)
    # special tokens and bytes often; ids without a token too
    token = st.one_of(st.integers(0, 2), st.integers(0, size + 2), st.integers(max(0, size - 30), size - 1))
    ids = data.draw(st.lists(token, max_size=14))
    assert "".join(pieces(processor, ids)) == processor.decode(ids)


@pytest.mark.parametrize("special", SPECIAL)
def test_a_space_after_a_special_token_stays(special):
    processor = of("SentencePiece of Llama 2")
    ids = processor.tokenizer.convert_tokens_to_ids(["flew", "▁фе", special, "▁bridge"])
    assert "".join(pieces(processor, ids)) == "flew фе bridge"


def test_a_bad_byte_after_a_good_character_spoils_both_as_in_the_whole_text():
    processor = of("SentencePiece of Gemma")
    ids = processor.tokenizer.convert_tokens_to_ids(["a", "<0xE6>", "<0xA0>", "<0x91>", "<0xFF>", "b"])
    assert processor.decode(ids) == "a\ufffd\ufffd\ufffd\ufffdb"
    assert "".join(pieces(processor, ids)) == processor.decode(ids)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "clean" not in name])
def test_words_are_given_at_once(name):
    processor = of(name)
    ids = processor.tokenizer.convert_tokens_to_ids(["a", "b"])
    assert "".join(pieces(processor, ids)[:2]) == processor.decode(ids)


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
def test_pieces_of_many_ids_of_a_whole_vocabulary_join_up_to_their_text(tiny, seed):
    ids = np.random.default_rng(seed).integers(0, len(tiny.processor.tokenizer), 60)
    assert "".join(pieces(tiny.processor, ids)) == tiny.processor.decode(ids)
