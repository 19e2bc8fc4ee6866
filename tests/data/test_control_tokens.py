"""Text from outside stays text: control tokens of a prompt are those that the chat template writes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from jvlm import families
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.processor import Processor
from jvlm.data.template import ChatTemplate
from tests import idefics2
from tests.chat_templates import FORMATS, KINDS, make
from tests.support import SPECIAL_TOKENS, picture

TEXT = families.get("composed").chat_format
MEDIA = ("<|image_pad|>", "<|video_pad|>")


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def tokenize(template, messages, **options):
    conversation = parse_example({"messages": messages})
    options = {"generation_prompt": False, "origin": Origin(), "tools": conversation.tools, **options}
    return template.tokenize(conversation.messages, **options)


def other_spelling(token):
    """As no text here spells it."""
    return f"{token[0]}¤{token[1:]}"


@pytest.fixture(scope="module")
def pairs():
    """(our template, tokenizer, the same tokenizer with its control tokens spelled differently) of kind and format."""
    made = {}
    for kind in KINDS:
        for name, form in FORMATS.items():
            tokenizer = make(kind, form)
            made[kind, name] = ChatTemplate(tokenizer, TEXT), tokenizer, make(kind, form, rename=other_spelling)
    return made


def fragments(form):
    control = st.sampled_from([*form.special, *form.words])
    cut = st.builds(lambda token, n: (token[:n], token[n:]), control, st.integers(1, 4))
    plain = st.sampled_from(
        ["<", ">", "|>", "<|", " ", "\n", "user\n", "assistant\n", "the answer", "é", "\ue000", "\U000f0003"]
    )
    part = st.one_of(control, cut.map(lambda c: c[0]), cut.map(lambda c: c[1]), plain)
    return st.lists(part, max_size=6).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_spellings_of_control_tokens_are_ordinary_text(pairs, kind, name, data):
    template, tokenizer, other = pairs[kind, name]
    words = fragments(FORMATS[name])
    messages = chat(*data.draw(st.lists(words, min_size=2, max_size=6)))
    prompt = len(messages) % 2 == 1
    ids, weights, _ = tokenize(template, messages, generation_prompt=prompt)
    # where control tokens are spelled differently, these texts spell none
    theirs = other.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    ends = [n for n, i in enumerate(ids) if i == tokenizer.eos_token_id and weights[n]]
    assert len(ends) == (0 if prompt else len(messages) // 2)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_there_are_as_many_turns_as_messages(tiny, data):
    tokens = [t for t in SPECIAL_TOKENS if t not in MEDIA]
    part = st.sampled_from([*tokens, "<|im_", "start|>", "end|>", "assistant\n", "system\n", " ", "a cat", "<", ">"])
    words = st.lists(part, max_size=8).map("".join)
    system, *rest = data.draw(st.lists(words, min_size=3, max_size=7))
    messages = [{"role": "system", "content": system}, *chat(*rest)]
    plain = [{**m, "content": "a"} for m in messages]
    prompt = data.draw(st.booleans())
    ids, neutral = (tiny.processor.encode({"messages": m}, generation_prompt=prompt).tokens for m in (messages, plain))
    known = tiny.processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert [i for i in ids if i in known] == [i for i in neutral if i in known]
    decoded = tiny.processor.tokenizer.decode(ids)
    assert all(m["content"] in decoded for m in messages[: len(messages) - prompt])


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("token", [t for t in SPECIAL_TOKENS if t not in MEDIA])
def test_a_special_token_in_a_text_of_any_role_is_text(tiny, role, token):
    def record(words):
        texts = {"system": "be brief", "user": "is there a dog?", "assistant": "no", "tool": "none", role: words}
        messages = [{"role": r, "content": texts[r]} for r in ("system", "user", "assistant", "tool")]
        return {"messages": [*messages, *chat("so?", "yes")]}

    example, plain = (tiny.processor.encode(record(words)) for words in (f"a {token} b", "a b"))
    known = tiny.processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert [i for i in example.tokens if i in known] == [i for i in plain.tokens if i in known]
    tokenizer = tiny.processor.tokenizer
    begin = tokenizer(f"<|im_start|>{role}\n")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    at = next(n for n in range(len(example.tokens)) if list(example.tokens[n : n + len(begin)]) == begin) + len(begin)
    own = list(example.tokens[at : list(example.tokens).index(end, at)])
    assert own == tokenizer(f"a {token} b", split_special_tokens=True)["input_ids"]


def test_a_picture_beside_spelled_tokens(tiny):
    record = {"messages": chat("<|im_end|><image><|vision_start|>what?", "a cat"), "images": [picture(56, 84)]}
    example = tiny.processor.encode(record)
    assert tiny.processor.tokenizer.decode(example.tokens).count("<|vision_start|>") == 2
    start = tiny.config["vision_start_token_id"]
    assert (example.tokens == start).sum() == 1
    assert (example.vision_index >= 0).sum() == 6


@pytest.mark.parametrize("token", [idefics2.FAKE, idefics2.END, "<s>", "</s>", "<unk>"])
def test_tokens_of_idefics2_in_text(tmp_path, token):
    from jvlm.weights import hf

    folder = tmp_path / "model"
    idefics2.write_folder(folder, split=False)
    processor = hf.load_processor(folder, hf.read_config(folder))

    def encode(words):
        record = {"messages": chat(f"<image>{words} is it?", f"no {words}"), "images": [picture(84, 84)]}
        return processor.encode(record)

    example, plain = encode(token), encode("dog")
    known = processor.tokenizer.convert_tokens_to_ids([*idefics2.SPECIAL])
    assert [i for i in example.tokens if i in known] == [i for i in plain.tokens if i in known]
    text = processor.tokenizer.decode(example.tokens)
    assert text.count(token) - processor.tokenizer.decode(plain.tokens).count(token) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_that_are_not_special_are_words(pairs, kind):
    template, tokenizer, _ = pairs[kind, "qwen3"]
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    ids, _, _ = tokenize(template, chat("call <tool_call>", "<think>\na\n</think>\n\n<tool_call>x</tool_call>"))
    counts = [int((ids == tokenizer.convert_tokens_to_ids(tag)).sum()) for tag in tags]
    assert counts == [1, 1, 2, 1]


def test_turn_marks_are_control_tokens_though_not_special(pairs):
    template, tokenizer, _ = pairs["byte level", "deepseek"]
    ids, _, _ = tokenize(template, chat("a<|Assistant|>b</s><|User|>", "<think>c</think>d"))
    assert [int((ids == tokenizer.convert_tokens_to_ids(t)).sum()) for t in ("<|User|>", "<|Assistant|>")] == [1, 1]


def test_tokens_of_the_configured_box_format_are_words(tiny):
    example = {"messages": chat("where?", "<|box_start|>(1,2),(3,4)<|box_end|><|im_end|>")}
    config = dataclasses.replace(tiny.processor.config, box_format="qwen_tokens")
    own = Processor(tiny.processor.tokenizer, tiny.model.config, config)
    names = ("<|box_start|>", "<|box_end|>", "<|im_end|>")
    ids = tiny.processor.tokenizer.convert_tokens_to_ids(list(names))
    counts = [[int((p.encode(example).tokens == i).sum()) for i in ids] for p in (own, tiny.processor)]
    assert counts == [[1, 1, 3], [0, 0, 3]]


@pytest.mark.parametrize("where", ["user", "assistant", "tools"])
def test_a_media_token_in_text_is_refused_with_the_tag_to_write(tiny, where):
    messages = chat("a <|image_pad|>" if where == "user" else "a", "<|image_pad|>" if where == "assistant" else "b")
    tools = [{"name": "<|image_pad|>"}] if where == "tools" else []
    with pytest.raises(ExampleError, match=r"1 media tokens in the text for 0 media.*<image>"):
        tiny.processor.encode({"messages": messages, "tools": tools})


def test_a_media_token_that_the_model_itself_has_answered_is_text_in_the_next_prompt(tiny):
    record = {"messages": chat("what is in it?", "an <|image_pad|>", "<image>and here?"), "images": [picture(56, 84)]}
    example = tiny.processor.encode(record, generation_prompt=True)
    assert (example.vision_index >= 0).sum() == (example.tokens == tiny.config["image_token_id"]).sum() == 6
    assert "an <|image_pad|><|im_end|>" in tiny.processor.tokenizer.decode(example.tokens)
    with pytest.raises(ExampleError, match="2 media tokens in the text for 1 media"):
        tiny.processor.encode({**record, "messages": [*record["messages"], *chat("", "a dog")[1:]]})


def test_a_spelling_made_by_the_normalizer_is_text():
    tokenizer = make("byte level", FORMATS["chatml"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|call|>", normalized=True, special=True)]})
    template = ChatTemplate(tokenizer, TEXT)
    call = tokenizer.convert_tokens_to_ids("<|call|>")
    wide = "\uff1c|call|\uff1e"
    assert call in tokenizer(wide)["input_ids"]
    ids, _, _ = tokenize(template, chat(f"a {wide}", "b <|call|>"))
    assert call not in ids
    assert tokenizer.decode(ids).count("<|call|>") == 2


def test_what_cannot_be_told_apart_is_refused(tiny):
    with pytest.raises(ExampleError, match=r"'<\|im_end\|>' cannot be written as ordinary text here: .*U\+FDD0"):
        tiny.processor.encode({"messages": chat("a <|im_end|> \ufdd0", "b")})
    tiny.processor.encode({"messages": chat("a \ufdd0", "b")})
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if '<|im_end|>' in m.content %}!{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}"
    )
    with pytest.raises(ExampleError, match=r"'<\|im_end\|>' cannot be written .*takes it for its own"):
        Processor(tokenizer, tiny.model.config).encode({"messages": chat("a <|im_end|>", "b")})


def test_a_token_cut_in_two_is_not_joined_by_the_template(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    body = "{{ m.content | trim }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{body}{{% endfor %}}"
    template = ChatTemplate(tokenizer, families.get("qwen2_5_vl").chat_format)
    ids, weights, _ = tokenize(template, chat("a <|im_ ", " end|> b"))
    assert tokenizer.decode(ids) == "a <|im_end|> b<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert tokenizer.decode(ids[weights > 0]).endswith("end|> b<|endoftext|>")
    assert [int(i) for i in ids] == [
        *tokenizer("a <|im_end|> b", split_special_tokens=True)["input_ids"],
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    ]


def test_special_tokens_added_later_are_control_tokens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    template = ChatTemplate(tokenizer, families.get("qwen2_5_vl").chat_format)
    tokenizer.add_tokens(["<|call|>"], special_tokens=True)
    ids, _, _ = tokenize(template, chat("a <|call|>", "b"))
    assert tokenizer.convert_tokens_to_ids("<|call|>") not in ids


def test_a_processor_that_has_met_spelled_tokens_is_sent_to_workers(tiny):
    import pickle

    record = {"messages": chat("a <|im_end|>", "b")}
    example = tiny.processor.encode(record)
    again = pickle.loads(pickle.dumps(tiny.processor)).encode(record)
    np.testing.assert_array_equal(example.tokens, again.tokens)
