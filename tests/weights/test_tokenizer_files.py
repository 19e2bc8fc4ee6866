"""Exported tokenizers in the form that transformers 4.49, 4.57 and 5 share: the small form of `every_transformers`.

What the older versions require is written here from their code; that they read it is tested by `make test-exports`.
"""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import jvlm
from jvlm.weights import convert, hf, tokenizer_files
from tests import idefics2, support

TEXTS = [
    "the cat <|im_end|>\n<image>é 640 x 480",
    " two  spaces",
    "<|vision_start|>is it?<end_of_utterance>\nAssistant: a",
]
SOURCES = {
    "Qwen2Tokenizer": {},
    "Qwen2TokenizerFast": {"tokenizer_class": "Qwen2TokenizerFast"},
    "PreTrainedTokenizerFast": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "a list of tokens": {"additional_special_tokens": list(support.SPECIAL_TOKENS[1:])},
    "named tokens": {"extra_special_tokens": {"image_token": "<|image_pad|>"}, "tokenizer_class": "Qwen2Tokenizer"},
    "both": {"extra_special_tokens": {"image_token": "<|image_pad|>"}, "additional_special_tokens": ["<|box_start|>"]},
    "saved by transformers 5": {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|box_start|>"],
                                "backend": "tokenizers", "is_local": True},
}  # fmt: skip


def check(folder, source):
    """The keys that transformers 4.49 and 4.57 look at, and equal ids in the installed transformers."""
    values = json.loads((folder / "tokenizer_config.json").read_text())
    # a class of theirs that takes tokenizer.json as it is
    assert values["tokenizer_class"] in ("Qwen2Tokenizer", "PreTrainedTokenizerFast")
    # 4.x: AttributeError: 'list' object has no attribute 'keys'
    assert isinstance(values.get("extra_special_tokens", {}), dict)
    assert isinstance(values.get("additional_special_tokens", []), list)
    whole = json.loads((folder / "tokenizer.json").read_text())
    # 4.x changes the tokenizer where the key says otherwise, and builds it anew from tokenizer.model for Llama's class
    assert values.get("add_prefix_space") == whole["pre_tokenizer"].get("add_prefix_space")
    # 4.x takes other lists of special tokens where this one is missing
    assert values["added_tokens_decoder"] == {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in whole["added_tokens"]
    }
    assert not (folder / "special_tokens_map.json").exists()
    assert not (folder / "added_tokens.json").exists()
    # the generic class adds token_type_ids by itself
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    assert isinstance(values["chat_template"], str)
    assert {"backend", "is_local", "local_files_only", "model_specific_special_tokens"}.isdisjoint(values)
    before, after = (AutoTokenizer.from_pretrained(str(f)) for f in (source, folder))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    generic = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == plain.encode(text).ids == generic(text)["input_ids"] == ids
        assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
    assert after.special_tokens_map == before.special_tokens_map
    assert set(after.all_special_tokens) == set(before.all_special_tokens)
    assert after.model_max_length == before.model_max_length


@pytest.mark.parametrize("settings", SOURCES.values(), ids=SOURCES)
def test_a_tokenizer_of_qwen_is_written_for_every_version(tiny, tmp_path, settings):
    source = shutil.copytree(tiny.folder, tmp_path / "source")
    values = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**values, **settings}))
    processor = hf.load_processor(source, tiny.model.config)
    jvlm.save(tiny.model, processor, tmp_path / "once")
    check(tmp_path / "once", source)
    jvlm.save(tiny.model, hf.load_processor(tmp_path / "once", tiny.model.config), tmp_path / "twice")
    check(tmp_path / "twice", source)
    first, second = ((tmp_path / n / "tokenizer_config.json").read_text() for n in ("once", "twice"))
    assert json.loads(first) == json.loads(second)
    convert.convert(tmp_path / "twice", tmp_path / "converted")
    assert (tmp_path / "converted" / "tokenizer_config.json").read_text() == second


@pytest.mark.parametrize(
    "settings", [{}, {"add_prefix_space": True}, {"add_prefix_space": None, "legacy": True}], ids=str
)
def test_a_tokenizer_of_llama_s_class_is_written_for_every_version(tmp_path, settings):
    source = tmp_path / "source"
    idefics2.write_folder(source, split=False, tokenizer=idefics2.write_llama_tokenizer, vocab_size=512)
    values = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**values, **settings}))
    jvlm.save(*jvlm.load(source), tmp_path / "once")
    check(tmp_path / "once", source)


def test_a_snapshot_saved_by_transformers_5_is_converted_for_every_version(tiny, tmp_path):
    source = shutil.copytree(tiny.folder, tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {**settings, "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|im_end|>"]}
        )
    )
    AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(source))
    assert json.loads((source / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    convert.convert(source, tmp_path / "converted")
    check(tmp_path / "converted", source)


def test_the_demo_s_own_tokenizer_is_written_for_every_version(tmp_path):
    source = support.ROOT / "configs/mimo_vl/easy_vqa_data/tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    tokenizer_files.save(tokenizer, tmp_path, tokenizer.chat_template)
    check(tmp_path, source)


def test_vocabularies_of_another_tokenizer_do_not_stay_beside_the_new_one(tiny, tmp_path):
    target = shutil.copytree(tiny.folder, tmp_path / "target")
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        (target / name).write_text("{}")
    jvlm.save(tiny.model, tiny.processor, target)
    assert (target / "tokenizer.model").exists()  # of the same vocabulary
    other = json.loads((target / "tokenizer.json").read_text())
    other["model"]["vocab"] = dict(list(other["model"]["vocab"].items())[:-1])
    (target / "tokenizer.json").write_text(json.dumps(other))
    jvlm.save(tiny.model, tiny.processor, target)
    assert not any((target / name).exists() for name in ("vocab.json", "merges.txt", "tokenizer.model"))
