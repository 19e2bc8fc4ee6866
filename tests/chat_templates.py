"""Chat templates in the shapes that published models have, and small tokenizers of every kind that they come with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support import GOLDEN

_CORPUS = (
    "What is the answer? The answer is red, or blue; one two three four five.",
    "user assistant system tool model think answer weather in Oslo INST SYS end start turn image",
    "is there a red circle? yes, no. the cat sat on the mat and the dog ran away from it.",
)


@dataclasses.dataclass(frozen=True)
class Format:
    """A template, the special tokens of its tokenizer, and what it can take.

    Attributes:
      words: added tokens that are not special.
      alternates: refuses roles that do not alternate.
      system, tools: takes a system turn; writes tools and calls of them.
    """

    name: str
    special: tuple[str, ...]
    end: str
    begin: str | None = None
    words: tuple[str, ...] = ()
    alternates: bool = False
    system: bool = True
    tools: bool = False

    @property
    def template(self) -> str:
        return (GOLDEN / "chat_templates" / f"{self.name}.jinja").read_text()


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = ("<unk>", "<s>", "</s>")
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Their templates mark with {% generation %} what the assistant writes, for transformers; jvlm does not read that.
FORMATS = {
    "chatml": Format("chatml", _CHATML, "<|im_end|>"),
    "smollm2": Format("smollm2", _CHATML, "<|im_end|>"),
    "qwen3": Format("qwen3", _CHATML, "<|im_end|>", words=_TAGS, tools=True),
    "llama2": Format("llama2", _LLAMA, "</s>", begin="<s>", alternates=True),
    "llama3": Format(
        "llama3",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        begin="<|begin_of_text|>",
    ),
    "mistral": Format(
        "mistral",
        (*_LLAMA, "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"),
        "</s>",
        begin="<s>",
        system=False,
        tools=True,
    ),
    "gemma": Format(
        "gemma",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        begin="<bos>",
        words=("\n\n", "<unused0>"),
        alternates=True,
        system=False,
    ),
    "zephyr": Format("zephyr", _LLAMA, "</s>"),
    "vicuna": Format("vicuna", _LLAMA, "</s>"),
    # its turn marks are added tokens that are not special, as DeepSeek's are
    "deepseek": Format(
        "deepseek", ("<s>", "</s>"), "</s>", begin="<s>", words=("<|User|>", "<|Assistant|>", "<think>", "</think>")
    ),
}


def _byte_level(trim: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?[\p{L}]+|\p{N}|[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _sentencepiece(special: Sequence[str], legacy: bool) -> Tokenizer:
    """BPE over words that begin with the mark of a space; special tokens stand in its vocabulary, as Llama's do."""
    trained = Tokenizer(models.BPE(byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [*special, *_BYTES, *(piece for piece in model["vocab"] if piece not in special)]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    unknown = "<unk>" if "<unk>" in special else None
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _unigram(special: Sequence[str]) -> Tokenizer:
    """A unigram model: every piece of its vocabulary is found in text, special tokens among them."""
    words = sorted({f"▁{w}" for line in _CORPUS for w in line.split()} | {w for line in _CORPUS for w in line.split()})
    # the first special token stands for what is unknown
    pieces = [*((token, 0.0) for token in special), *((byte, -20.0) for byte in _BYTES)]
    known = {p for p, _ in pieces}
    pieces += [(chr(c), -9.0) for c in range(33, 127)] + [("▁", -4.0)]
    pieces += [(w, -6.0) for w in words if len(w) > 1 and w not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


KINDS = {
    "byte level": lambda special: _byte_level(trim=False),
    "byte level, trimmed offsets": lambda special: _byte_level(trim=True),
    "sentencepiece, legacy": lambda special: _sentencepiece(special, legacy=True),
    "sentencepiece": lambda special: _sentencepiece(special, legacy=False),
    "unigram": _unigram,
}


def make(kind: str, form: Format, more: Sequence[str] = (), rename: Any = None) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind with a format's tokens and template, and ``more`` special tokens.

    ``rename`` gives the special tokens other spellings, in the template as well: same ids, for texts that hold the
    usual spellings as ordinary text.
    """
    name = rename or (lambda token: token)
    special = [name(token) for token in (*form.special, *more)]
    markers = [name(w) if w in form.template and w.startswith("<|") else w for w in form.words]
    tokenizer = KINDS[kind](special)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in markers])
    template = form.template
    if rename:
        for token in (*form.special, *(w for w in form.words if w.startswith("<|"))):
            template = template.replace(token, name(token))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=name(form.begin) if form.begin else None,
        eos_token=name(form.end),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
