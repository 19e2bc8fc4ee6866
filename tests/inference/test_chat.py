"""The terminal chat, with scripted input and, where its words matter, a scripted model."""

import jvlm
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
        return self.lines.pop(0)

    def write(self, text):
        self.shown += text


def talk(tiny, *lines, system=None):
    script = Script(*lines)
    chat(tiny.model, tiny.processor, SamplingConfig(max_new_tokens=4), system, read=script.read, write=script.write)
    return script


def scripted_model(monkeypatch, *answers):
    """Answers in two pieces each; returns the prompts that the model was given."""
    waiting, prompts = list(answers), []

    def stream_example(engine, example, sampling):
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
    assert [q for q in script.asked if "picture" in q] == ["Path of the picture <<< "] * 2
    assert prompts[1].count("<|vision_start|>") == 2


def test_a_picture_that_is_not_there_is_an_error_that_leaves_the_conversation_as_it_was(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "a cat", "yes")
    script = talk(tiny, "what?", "<image>and this?", "missing.png", "is it red?", "quit")
    assert "file not found; tried missing.png" in script.shown
    assert len(prompts) == 2
    assert "and this?" not in prompts[1]
    assert "a cat" in prompts[1]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(tiny, monkeypatch):
    def interrupted(engine, example, sampling):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream_example", interrupted)
    script = talk(tiny, "what?", "again?")
    assert script.shown.count("half [stopped]") == 2


def test_an_answer_that_looks_like_a_tag_does_not_spoil_the_conversation(tiny, monkeypatch):
    prompts = scripted_model(monkeypatch, "an <image> tag", "yes")
    assert "field" not in talk(tiny, "what?", "sure?", "quit").shown
    assert "an image tag" in prompts[1]


def test_boxes_of_an_answer_are_shown_in_pixels_of_the_original_picture(tiny, monkeypatch, tmp_path):
    picture(300, 150).save(tmp_path / "p.png")
    row = prompt("<image>where?", images=[str(tmp_path / "p.png")])
    example = tiny.processor.encode(row, generation_prompt=True)
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
