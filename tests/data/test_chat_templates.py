"""Templates in the shapes of published ones: ids as transformers gives them, and what of them is learnt."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from jvlm import families
from jvlm.data.errors import ExampleError, Origin
from jvlm.data.examples import parse_example
from jvlm.data.processor import Processor
from jvlm.data.template import ChatTemplate
from jvlm.errors import UserError
from tests.chat_templates import FORMATS, KINDS, make
from tests.idefics2 import END, SPECIAL, write_tokenizer
from tests.support import make_tokenizer, picture

TEXT = families.get("composed").chat_format
ORIGIN = Origin("examples.jsonl", 3)


def turns(*contents, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, *({"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents))]


CHATS = {
    "one turn": turns("what is it?", "red"),
    "several turns, outer white space": turns(" what is it? ", "red", "and\n", " the cat\nran. \n"),
    "a system turn": turns("a", "b", system="be brief"),
    "thinking": turns("a", "<think>\nfirst\n</think>\n\nx", "b", "<think>second</think>\ny"),
    "an empty answer, private use characters, accents": turns("a", "", "b", "\ue000\U000f0000 café e\u0301 \U0001f600"),
}


def tokenize(tokenizer, messages, *, generation_prompt=False, style=TEXT, tools=()):
    conversation = parse_example({"messages": messages}, ORIGIN)
    return ChatTemplate(tokenizer, style).tokenize(
        conversation.messages, generation_prompt=generation_prompt, origin=ORIGIN, tools=tools
    )


@pytest.fixture(scope="module")
def tokenizers():
    return {(kind, name): make(kind, form) for kind in KINDS for name, form in FORMATS.items()}


def learnt(tokenizer, ids, chosen):
    """The words of the chosen tokens; white space around them may belong to either side of a border."""
    return "".join(tokenizer.decode(ids[np.asarray(chosen, bool)]).split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_what_is_learnt_are_those_of_transformers(tokenizers, kind, name):
    tokenizer, form = tokenizers[kind, name], FORMATS[name]
    for messages in CHATS.values():
        if messages[0]["role"] == "system" and not form.system:
            continue
        ids, weights, turn = tokenize(tokenizer, messages)
        # transformers finds no token for a space that offsets leave out; the ids are those of the untrimmed kind
        oracle = tokenizers["byte level" if "trimmed" in kind else kind, name]
        theirs = oracle.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        np.testing.assert_array_equal(ids, theirs["input_ids"])
        assert learnt(tokenizer, ids, weights > 0) == learnt(tokenizer, ids, theirs["assistant_masks"])
        answers = sum(m["role"] == "assistant" for m in messages)
        assert (weights[ids == tokenizer.eos_token_id] == 1).sum() == answers == turn.max()
        prompt = messages[:-1]
        ids, weights, turn = tokenize(tokenizer, prompt, generation_prompt=True)
        theirs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        np.testing.assert_array_equal(ids, theirs["input_ids"])
        assert not weights.any()
        assert not turn.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_token_is_learnt_behind_white_space(tokenizers, kind):
    tokenizer = tokenizers[kind, "llama2"]
    ids, weights, _ = tokenize(tokenizer, turns("hi", "red"))
    assert tokenizer.decode(ids[weights > 0]).strip() == "red </s>"
    assert weights[-1] == 1
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", families.names())
def test_the_built_in_templates_teach_an_end(tokenizer_folder, tmp_path, family):
    tiles = ("idefics2", "idefics3", "smolvlm")
    folder = write_tokenizer(tmp_path, template=False) if family in tiles else tokenizer_folder
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = None
    ids, weights, _ = tokenize(tokenizer, turns("hi", "red", "and", "blue"), style=families.get(family).chat_format)
    end = "<end_of_utterance>" if family in tiles else "<|im_end|>"
    assert tokenizer.decode(ids[weights > 0]).replace(" ", "") == f"red{end}blue{end}"


def test_thinking_is_learnt_where_the_template_shows_it(tokenizers):
    tokenizer = tokenizers["byte level", "qwen3"]
    ids, weights, turn = tokenize(tokenizer, CHATS["thinking"])
    shown = [tokenizer.decode(ids[(weights > 0) & (turn == n)]) for n in (1, 2)]
    assert shown == ["x<|im_end|>", "<think>\nsecond\n</think>\n\ny<|im_end|>"]


def test_thinking_dropped_by_a_template_without_a_prompt_is_not_learnt(tokenizers):
    dropping = tokenizers["byte level", "vicuna"].chat_template.replace(
        "m.content + eos_token", "m.content.split('</think>')[-1].lstrip('\\n') + eos_token"
    )
    tokenizer = make("byte level", FORMATS["vicuna"])
    tokenizer.chat_template = dropping
    ids, weights, _ = tokenize(tokenizer, CHATS["thinking"])
    assert tokenizer.decode(ids[weights > 0]) == " x</s> y</s>"


def test_thinking_dropped_where_nothing_opens_an_answer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if not loop.last %}"
        "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    example = Processor(tokenizer, tiny.model.config).encode({"messages": CHATS["thinking"]})
    shown = [tokenizer.decode(example.tokens[(example.loss_weights > 0) & (example.turns == n)]) for n in (1, 2)]
    assert shown == ["x<|im_end|>", "<think>second</think>\ny<|im_end|>"]


def test_weights_of_turns_follow_their_words(tokenizers):
    messages = turns("a", " one ", "b", "two", "c", "three")
    messages[1]["loss_scale"], messages[3]["loss"] = 0.5, False
    for name in ("llama2", "llama3", "qwen3"):
        tokenizer = tokenizers["byte level", name]
        ids, weights, _ = tokenize(tokenizer, messages)
        assert "one" in learnt(tokenizer, ids, weights == 0.5)
        assert "three" in learnt(tokenizer, ids, weights == 1)
        assert [w for i, w in zip(ids, weights, strict=True) if i == tokenizer.eos_token_id][-3:] != [0, 0, 0]
        assert "two" in learnt(tokenizer, ids, weights == 0)


def test_a_base_model_without_the_end_token_answers_but_learns_nothing(tmp_path):
    kept = [token for token in SPECIAL if token != END]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    folder = make_tokenizer(tmp_path, kept, begin="<s>", chat_template=None, **settings)
    tokenizer, style = AutoTokenizer.from_pretrained(str(folder)), families.get("idefics2").chat_format
    tokenize(tokenizer, turns("hi"), generation_prompt=True, style=style)
    with pytest.raises(ExampleError, match=r"the end of answers would have no loss.*grow_embedding"):
        tokenize(tokenizer, turns("hi", "red"), style=style)


LOOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
NO_END = {
    "nothing behind an answer": LOOP + "{{ '\\n' }}{% endfor %}",
    "an end that the tokenizer does not know": LOOP + "{{ '</s>' }}{% endfor %}",
    "an end between turns only": LOOP + "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
    "words first": LOOP + "{{ ' END <|im_end|>' }}{% endfor %}",
}


@pytest.mark.parametrize("name", NO_END)
def test_a_template_under_which_no_end_is_learnt_is_refused(tiny, name):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = NO_END[name]
    with pytest.raises(UserError, match=r"after an answer.*never learn to stop.*<\|im_end\|>"):
        Processor(tokenizer, tiny.model.config)


def test_an_answer_without_an_end_is_refused_where_only_the_example_shows_it(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = LOOP + "{% if m.content != 'blue' %}<|im_end|>{% endif %}{% endfor %}"
    processor = Processor(tokenizer, tiny.model.config)
    processor.encode({"messages": turns("hi", "red")})
    with pytest.raises(ExampleError, match="the end of answers would have no loss"):
        processor.encode({"messages": turns("hi", "blue")})


def test_an_end_only_after_the_last_answer_is_enough(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    body = "{{ m.role + ': ' + m.content + '\\n' }}{% if loop.last %}<|im_end|>{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{body}{{% endfor %}}"
    example = Processor(tokenizer, tiny.model.config).encode({"messages": turns("hi", "red", "and", "blue")})
    words = tokenizer.decode(example.tokens[example.loss_weights > 0])
    assert words.split() == ["red", "blue", "<|im_end|>"]


@pytest.mark.parametrize("splits", [False, True])
def test_ids_are_those_that_a_call_of_the_tokenizer_gives_whatever_its_backend_was_left_to_do(tiny, splits):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder), split_special_tokens=splits)
    template = ChatTemplate(tokenizer, TEXT)
    messages = parse_example({"messages": turns("a red square?")}).messages
    called = tokenizer(template.render(messages, generation_prompt=True), add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.encode_special_tokens = not splits
    ids, _, _ = template.tokenize(messages, generation_prompt=True, origin=ORIGIN)
    assert ids.tolist() == called
    assert (tokenizer.convert_tokens_to_ids("<|im_start|>") in called) != splits


REFUSED = {
    "words of its own": ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
    "a type error": ("{{ messages[0].content + 3 }}", "TypeError"),
    "an unknown name": ("{{ nowhere.inside }}", "'nowhere' is undefined"),
    "a division by nothing": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "a filter of another kind": ("{{ messages | first | abs }}", "TypeError"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "another place in memory": ("{{ messages.append(1) }}", "unsafe"),
}


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_whatever_a_template_raises_is_an_error_of_the_example(tiny, name, generation_prompt):
    source, says = REFUSED[name]
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = (
        f"{{% if messages[0].content == 'x' %}}{source}{{% endif %}}{LOOP}<|im_end|>{{% endfor %}}"
    )
    processor = Processor(tokenizer, tiny.model.config)
    processor.encode({"messages": turns("fine", "red")})
    with pytest.raises(ExampleError) as caught:
        processor.encode(parse_example({"messages": turns("x", "y", "z")}, ORIGIN), generation_prompt=generation_prompt)
    assert str(caught.value).startswith("examples.jsonl, line 3, field 'messages': the chat template cannot take")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["llama2", "gemma"])
def test_roles_that_a_published_template_refuses(tokenizers, name):
    with pytest.raises(ExampleError, match="roles must alternate"):
        tokenize(tokenizers["byte level", name], [*turns("a"), *turns("b", "c")])


def test_a_picture_for_a_template_of_text_only(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = f"{LOOP}<|im_end|>{{% endfor %}}"
    processor = Processor(tokenizer, tiny.model.config)
    with pytest.raises(ExampleError, match="the chat template cannot take"):
        processor.encode({"messages": turns("<image>?", "red"), "images": [picture(56, 56)]})


def test_a_template_that_does_not_compile_is_refused_at_once(tiny):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }"
    with pytest.raises(UserError, match=r"not valid: line \d"):
        Processor(tokenizer, tiny.model.config)


LEFT_OUT = {
    "system": ([{"role": "system", "content": "be brief"}, *turns("a", "b")], "'be brief'"),
    "tool": ([*turns("a", "b"), {"role": "tool", "content": "22 degrees"}, *turns("c", "d")], "'22 degrees'"),
}


@pytest.mark.parametrize("role", LEFT_OUT)
def test_a_turn_that_the_template_leaves_out_is_not_lost_without_a_word(tiny, role):
    messages, says = LEFT_OUT[role]
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    tokenizer.chat_template = (
        LOOP.replace("messages %}", f"messages if m.role != '{role}' %}}") + "<|im_end|>{% endfor %}"
    )
    with pytest.raises(ExampleError, match=f"leaves out the {role} turn {says}"):
        Processor(tokenizer, tiny.model.config).encode({"messages": messages})


HALF = "\ud83d"


@pytest.mark.parametrize("example", [
    {"messages": turns("a", f"ok {HALF}")},
    {"messages": turns(f"{HALF} a", "b")},
    {"messages": turns("a", "b", system=f"x{HALF}")},
    {"messages": turns("<ref-object>", "b"), "objects": {"ref": [HALF], "bbox": []}},
], ids=["answer", "question", "system", "object"])  # fmt: skip
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_half_an_emoji_is_an_error_of_the_example(tiny, example, generation_prompt):
    if generation_prompt and HALF in example["messages"][-1]["content"]:
        example = {**example, "messages": [*example["messages"], *turns("more")]}
    with pytest.raises(ExampleError, match="surrogate"):
        tiny.processor.encode(example, generation_prompt=generation_prompt)
