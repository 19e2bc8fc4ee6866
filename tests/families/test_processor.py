"""A processor is never changed: another is made from it, and the caller's tokenizer stays as it was."""

import dataclasses

import pytest
from transformers import AutoTokenizer

from jvlm import families
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.errors import UserError
from tests import support
from tests.parallel import models

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A processor of Idefics2 over a tokenizer without a chat template, and that tokenizer."""
    special = ["<|im_end|>", "<|endoftext|>", FAKE, IMAGE, END]
    folder = support.make_tokenizer(tmp_path_factory.mktemp("tokenizer"), special, chat_template=None)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = models.idefics2()
    decoder = dataclasses.replace(model.decoder, vocab_size=400)
    model = dataclasses.replace(model, decoder=decoder, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE))
    return Processor(tokenizer, model, media_roots=("somewhere",), generation={"top_k": 3}), tokenizer


def test_the_tokenizer_that_is_given_gets_no_template(made):
    processor, tokenizer = made
    assert tokenizer.chat_template is None
    assert processor.template.templates == families.get("idefics2").chat_format.template
    example = processor.encode({"messages": [{"role": "user", "content": "hi"}]}, generation_prompt=True)
    assert tokenizer.convert_tokens_to_ids(END) in example.tokens
    assert tokenizer.chat_template is None


def test_another_processor_has_everything_that_its_settings_decide(made):
    processor, tokenizer = made
    fake = tokenizer.convert_tokens_to_ids(FAKE)
    assert (processor.delimiter_ids, processor.merged_delimiter_id) == ((fake,), fake)
    plain = processor.replace(image_config=dataclasses.replace(processor.image_config, delimiter="", split=False))
    assert (plain.delimiter_ids, plain.merged_delimiter_id) == ((), None)
    assert plain.settings()["image"]["delimiter"] == ""
    assert (plain.media_roots, plain.generation, plain.tokenizer) == (("somewhere",), {"top_k": 3}, tokenizer)
    example = {"messages": [{"role": "user", "content": "<image>?"}], "images": [support.picture(40, 40)]}
    with_delimiters, without = (p.encode(example, generation_prompt=True).tokens for p in (processor, plain))
    assert (with_delimiters == fake).sum() == 6  # five crops of 4 tokens, one delimiter between two
    assert (without == fake).sum() == 0
    # the first is as it was
    assert (processor.delimiter_ids, processor.image_config.split) == ((fake,), True)
    assert processor.replace(media_roots=()).media_roots == ()


def test_a_delimiter_that_the_tokenizer_lacks_is_refused(made):
    processor, _ = made
    with pytest.raises(UserError, match="the tokenizer has no token <absent>"):
        processor.replace(image_config=dataclasses.replace(processor.image_config, delimiter="<absent>"))


def test_settings_that_are_not_given_are_the_family_s(made):
    processor, tokenizer = made
    default = families.get("idefics2").image_config
    assert Processor(tokenizer, processor.model, ProcessorConfig(image=None)).config.image == default
