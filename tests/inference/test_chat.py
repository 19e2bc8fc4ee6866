"""The terminal chat, with scripted input and, where its words matter, a scripted model."""

import io
import sys

import pytest

import jvlm
from jvlm.errors import UserError
from jvlm.inference import chat as module
from jvlm.inference.chat import chat, original_boxes
from jvlm.inference.sampling import SamplingConfig
from tests.inference.support import prompt
from tests.support import picture


class Script:
    """Lines to read, what was asked for them, and what was shown."""

    def __init__(self, *lines):
        self.lines, self.asked, self.shown = list(lines), [], ""

    def read(self, question):
        self.asked.append(question)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text):
        self.shown += text


def talk(tiny, *lines, system=None):
    script = Script(*lines)
    chat(tiny.model, tiny.processor, SamplingConfig(max_new_tokens=4), system, read=script.read, write=script.write)
    return script


def scripted_model(monkeypatch, *answers):
    """Answers in two pieces each; returns the prompts that the model was given."""
    waiting, prompts = list(answers), []

    def stream_example(engine, example, sampling, adapter):
        text = engine.processor.tokenizer.decode([t for t in example.tokens if t != engine.config.image_token_id])
        prompts.append(text)
        answer = waiting.pop(0)
        yield answer[:2]
        yield answer[2:]

    monkeypatch.setattr(module, "stream_example", stream_example)
    return prompts


def test_the_answer_is_that_of_generate(tiny):
    expected = jvlm.generate(tiny.model, tiny.processor, [prompt("what is it?")], max_new_tokens=4)[0]
    assert expected + "\n" in talk(tiny, "what is it?", "quit").shown


def test_earlier_turns_are_part_of_the_prompt_until_clear(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "a cat", "yes", "no")
    talk(tiny, "what is it?", "is it red?", "clear", "who?", "exit", system="You are MiMo.")
    assert "what is it?" in prompts[1]
    assert "a cat" in prompts[1]
    assert "what is it?" not in prompts[2]
    assert all("You are MiMo." in p for p in prompts)


def test_reset_system_asks_for_a_prompt_and_forgets_the_conversation(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "a cat", "yes")
    talk(tiny, "what is it?", "reset-system", "Count objects.", "is it red?", system="You are MiMo.")
    assert "Count objects." in prompts[1]
    assert "MiMo" not in prompts[1]
    assert "a cat" not in prompts[1]


def test_lines_go_on_until_a_hash_in_multi_line_mode_and_commands_still_work(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "one", "two")
    script = talk(tiny, "multi-line", "first", "", "last#", "single-line", "is it?", "quit")
    assert "first\n\nlast<|im_end|>" in prompts[0]
    assert "is it?<|im_end|>" in prompts[1]
    assert len(script.asked) == 7


def test_as_many_paths_are_asked_for_as_there_are_image_tags(tiny, monkeypatch, tmp_path):
    prompts = scripted_model(monkeypatch, "both", "yes")
    for i in range(2):
        picture(84, 56, i).save(tmp_path / f"{i}.png")
    script = talk(tiny, "<image> and <image>?", str(tmp_path / "0.png"), f" {tmp_path / '1.png'} ", "sure?", "quit")
    assert [q for q in script.asked if "image" in q] == ["Path of the image <<< "] * 2
    assert prompts[1].count("<|vision_start|>") == 2


def test_a_picture_that_is_not_there_is_an_error_that_leaves_the_conversation_as_it_was(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "a cat", "yes")
    script = talk(tiny, "what?", "<image>and this?", "missing.png", "is it red?", "quit")
    assert "file not found; tried missing.png" in script.shown
    assert len(prompts) == 2
    assert "and this?" not in prompts[1]
    assert "a cat" in prompts[1]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(tiny, monkeypatch):
    def interrupted(engine, example, sampling, adapter):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream_example", interrupted)
    script = talk(tiny, "what?", "again?")
    assert script.shown.count("half [stopped]") == 2


def test_an_answer_that_looks_like_a_tag_does_not_spoil_the_conversation(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "an <image> tag", "yes")
    assert "field" not in talk(tiny, "what?", "sure?", "quit").shown
    assert "an <image> tag" in prompts[1]


def test_boxes_of_an_answer_are_shown_in_pixels_of_the_original_picture(tiny, monkeypatch, tmp_path):
    picture(300, 150).save(tmp_path / "p.png")
    record = prompt("<image>where?", images=[str(tmp_path / "p.png")])
    example = tiny.processor.encode(record, generation_prompt=True)
    ((original, (width, height)),) = example.sizes
    assert original == (300, 150)
    assert (width, height) != original
    answer = f'[{{"bbox_2d": [0, 0, {width}, {height}], "label": "all"}}]'
    scripted_model(monkeypatch, answer)
    shown = talk(tiny, "<image>where?", str(tmp_path / "p.png"), "quit").shown
    assert '300 x 150: [{"bbox_2d": [0, 0, 300, 150], "label": "all"}]' in shown
    assert original_boxes("no box here", tiny.processor, example) == ""


def test_end_of_input_ends_the_chat(tiny):
    assert talk(tiny).shown.endswith("\n")


NOT_UTF8 = UnicodeDecodeError("utf-8", b"what\xff", 4, 5, "invalid start byte")
FAULTS = {
    "bytes that are no UTF-8": (["what\udcff?"], "not UTF-8 text"),
    "half an emoji": (["what\ud83d?"], "not UTF-8 text"),
    "a strict reader": ([NOT_UTF8], "invalid start byte"),
    "a path of such bytes": (["<image>what?", "p\udcff.png"], "not UTF-8 text"),
    "a missing picture": (["<image>what?", "missing.png"], "file not found; tried missing.png"),
    "no path": (["<image>what?", ""], "images[0]"),
    "a folder": (["<image>what?", "."], "images[0]"),
    "a NUL in a path": (["<image>what?", "a\0b.png"], "images[0]"),
    "no picture": (["<image>what?", __file__], "cannot be decoded"),
    "a URL": (["<image>what?", "https://example.org/a.png"], "URL"),
    "a video": (["<video>what?"], "<video>"),
    "an over-long prompt": (["what " * 9000], "max_position_embeddings"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_goes_wrong_with_a_question_is_one_line_and_the_conversation_goes_on(tiny, monkeypatch, name):
    lines, message = FAULTS[name]
    prompts = scripted_model(monkeypatch, "a cat", "yes")
    script = talk(tiny, "first", *lines, "second", "quit")
    (line,) = [line for line in script.shown.split("\n") if message in line]
    assert line
    assert script.lines == []
    assert len(prompts) == 2
    plain = scripted_model(monkeypatch, "a cat", "yes")
    talk(tiny, "first", "second", "quit")
    assert prompts == plain


def test_bad_bytes_in_multi_line_mode_and_in_a_system_prompt_leave_both_as_they_were(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "one", "two")
    talk(
        tiny, "multi-line", "good", "b\udcffd#", "is it?#", "single-line", "reset-system", "\udcff", "b", system="Sys."
    )
    assert "is it?<|im_end|>" in prompts[0]
    assert "good" not in prompts[0]
    assert "Sys." in prompts[1]


@pytest.mark.parametrize(
    "error", [UserError("the scores are\nnot finite"), RuntimeError("out of memory"), MemoryError()]
)
def test_an_answer_that_fails_is_one_line_and_its_question_is_forgotten(tiny, monkeypatch, error):
    prompts = scripted_model(monkeypatch, "yes")
    good = module.stream_example

    def failing(engine, example, sampling, adapter):
        monkeypatch.setattr(module, "stream_example", good)
        yield "half"
        raise error

    monkeypatch.setattr(module, "stream_example", failing)
    shown = talk(tiny, "lost?", "again?", "quit").shown
    assert shown.count("no answer (") == 1
    assert "half\nno answer (" in shown
    assert "lost?" not in prompts[0]


def test_a_template_that_refuses_a_conversation_is_one_line(tiny, monkeypatch):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role\nnot supported') }}{% endif %}x"
    monkeypatch.setattr(tiny.processor.tokenizer, "chat_template", template)
    script = talk(tiny, "what?", "reset-system", "", "what?", "quit", system="You are MiMo.")
    (line,) = [line for line in script.shown.split("\n") if "System role not supported" in line]
    assert line
    assert script.lines == []


def test_ctrl_c_before_the_first_word_forgets_the_question(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "yes")
    good = module.stream_example

    def interrupted(engine, example, sampling, adapter):
        monkeypatch.setattr(module, "stream_example", good)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(module, "stream_example", interrupted)
    assert " [stopped]" in talk(tiny, "lost?", "again?", "quit").shown
    assert "lost?" not in prompts[0]


@pytest.mark.parametrize("lines", [["<image>?"], ["multi-line", "a"], ["reset-system"]])
@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_the_end_of_input_ends_the_chat_at_any_question(tiny, lines, end):
    assert talk(tiny, *lines, end).shown.endswith("\n")


@pytest.mark.parametrize(
    "numbers", ["1e308, 1e308, 1e309, 1e309", "NaN, 0, 1, 1", f"0, 0, {'9' * 400}, 1", "3, 3, 1, 1"]
)
def test_boxes_of_impossible_numbers_are_shown_in_no_other_pixels(tiny, numbers):
    example = tiny.processor.encode(prompt("<image>where?", images=[picture(300, 150)]), generation_prompt=True)
    answer = f'[{{"bbox_2d": [{numbers}], "label": "all"}}]'
    assert original_boxes(answer, tiny.processor, example) == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_characters_shows_escapes(tiny, monkeypatch, encoding):
    scripted_model(monkeypatch, "naïve 树")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    lines = ["what?", "quit"]
    chat(tiny.model, tiny.processor, SamplingConfig(max_new_tokens=4), read=lambda _: lines.pop(0))
    shown = terminal.buffer.getvalue().decode(encoding)
    assert {"ascii": "na\\xefve \\u6811", "latin-1": "naïve \\u6811"}[encoding] in shown
