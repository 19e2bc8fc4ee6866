"""The chat template of a folder: the one that AutoProcessor takes, able to write pictures, saved for every reader."""

import json
import shutil

import pytest
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

import jvlm
from jvlm.data.content import Message
from jvlm.errors import UserError
from jvlm.weights import hf
from tests import support

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# As the hub's Qwen2.5-VL has it in tokenizer_config.json: content is a string, another system turn.
TEXT_ONLY = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def template(name):
    """One that writes pictures, and its name before everything."""
    return (
        name + "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
        "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
        + PICTURE
        + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def lay(folder, where):
    """Write the template of each place, and the text-only one into tokenizer_config.json unless it has its own."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = where.get("tokenizer_config.json", TEXT_ONLY)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in where.items():
        if name.endswith(".jinja"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        elif name != "tokenizer_config.json":
            (folder / name).write_text(json.dumps({"chat_template": text, "processor_class": "Qwen2_5_VLProcessor"}))


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny.folder, tmp_path / "folder")


def load(folder):
    return hf.load_processor(folder, hf.read_config(folder))


J, L, P, A = (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "additional_chat_templates/other.jinja",
)


@pytest.mark.parametrize(
    "places", [(J,), (L,), (P,), (J, L), (J, P), (L, P), (J, L, P), (J, A), (J, A, P), ()], ids=" ".join
)
def test_the_processor_s_template_counts_in_the_order_of_transformers(folder, tmp_path, places):
    lay(folder, {name: template(name) for name in places} or {"tokenizer_config.json": template("own")})
    expected = ProcessorMixin.get_processor_dict(str(folder))[0].get("chat_template") or template("own")
    model, processor = jvlm.load(folder)
    assert processor.tokenizer.chat_template == expected
    jvlm.save(model, processor, tmp_path / "saved")
    assert ProcessorMixin.get_processor_dict(str(tmp_path / "saved"))[0]["chat_template"] == expected
    assert load(tmp_path / "saved").tokenizer.chat_template == expected
    assert AutoTokenizer.from_pretrained(str(tmp_path / "saved")).chat_template == expected


def test_two_templates_of_the_hub_write_pictures_and_the_processor_s_system_turn(folder, tmp_path):
    ours = (support.GOLDEN / "chat_template.jinja").read_text()
    lay(folder, {L: ours})
    model, processor = jvlm.load(folder)
    jvlm.save(model, processor, tmp_path / "saved")
    jvlm.save(model, processor, tmp_path / "run", format="jvlm")
    example = {"messages": [{"role": "user", "content": "<image>what is it?"}], "images": [support.picture(84, 56)]}
    for again in (processor, load(tmp_path / "saved"), jvlm.load(tmp_path / "run")[1]):
        text = again.tokenizer.decode(again.pack([example]).tokens[0])
        assert text.startswith(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_st"
        )
        assert again.template.render((Message("user", "hi", 0.0),), generation_prompt=False).count("helpful") == 1


@pytest.mark.parametrize("places", [(J,), (L,), (P,), ("tokenizer_config.json",), ()], ids=" ".join)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TEXT_ONLY, r"TypeError: .*"),
        ("{{ messages[0]['content'] }}!", r"it writes 0 <\|image_pad\|> for one image"),
        ("{% for m in messages %}{{ raise_exception('no') }}{% endfor %}", r"TemplateError: no"),
        ("{% for m in messages %}{{ m.content.strip() }}{% endfor %}", r"UndefinedError: .*"),
        ("{% for m in messages %}{% if m", r"TemplateSyntaxError: .*"),
        (template("") + PICTURE, r"it writes 2 <\|image_pad\|> for one image"),
    ],
    ids=range(6),
)
def test_a_template_that_cannot_write_a_picture_is_refused_with_its_file(folder, places, text, says):
    lay(folder, dict.fromkeys(places or ["tokenizer_config.json"], text))
    file = places[0] if places else "tokenizer_config.json"
    with pytest.raises(UserError, match=rf"{file}: this chat template cannot write an image \({says}\); put"):
        jvlm.load(folder)


def test_named_templates_of_a_tokenizer_are_kept_and_need_a_default(folder, tmp_path):
    named = {"default": template("d"), "other": template("o")}
    lay(folder, {"tokenizer_config.json": [{"name": n, "template": t} for n, t in named.items()]})
    model, processor = jvlm.load(folder)
    jvlm.save(model, processor, tmp_path / "saved")
    assert not (tmp_path / "saved" / L).exists()
    assert ProcessorMixin.get_processor_dict(str(tmp_path / "saved"))[0]["chat_template"] == named
    lay(folder, {"tokenizer_config.json": [{"name": "other", "template": template("o")}]})
    with pytest.raises(UserError, match=r"tokenizer_config.json: the chat templates other are named, and none is the"):
        load(folder)


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({L: template("l"), A: template("a")}, "chat_template.json and .*additional_chat_templates exclude each other"),
        ({L: ""}, "chat_template.json holds no chat_template"),
        ({L: 7}, "chat_template.json: chat_template is a int"),
        ({P: ["a"]}, "processor_config.json: chat_template is a list"),
        ({A: template("a")}, "additional_chat_templates: the chat templates other are named, and none is the default"),
    ],
)
def test_template_files_that_contradict_or_hold_nothing_are_refused(folder, places, says):
    lay(folder, places)
    with pytest.raises(UserError, match=says):
        load(folder)


@pytest.mark.parametrize("before", [(J,), (L,), (P,), (J, A), (L, P)], ids=" ".join)
@pytest.mark.parametrize("after", [(J,), (J, A)], ids=" ".join)
def test_saving_over_a_folder_leaves_no_template_of_another_model(tiny, folder, tmp_path, before, after):
    lay(folder, {name: template("new") for name in after})
    model, processor = jvlm.load(folder)
    target = shutil.copytree(tiny.folder, tmp_path / "target")
    lay(target, {name: template("old") for name in before})
    (target / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|im_start|>"}))
    jvlm.save(model, processor, target)
    for file in (path for path in target.rglob("*") if path.suffix in (".json", ".jinja")):
        assert "old{%" not in file.read_text(), file
        assert json.dumps(TEXT_ONLY)[1:40] not in file.read_text(), file
    assert (target / L).exists() == (A not in after)
    assert load(target).tokenizer.chat_template == processor.tokenizer.chat_template


def test_convert_takes_all_templates_along(folder, tmp_path):
    from jvlm.weights.convert import convert

    lay(folder, {J: template("j"), A: template("a")})
    convert(folder, tmp_path / "converted")
    assert load(tmp_path / "converted").tokenizer.chat_template == {"default": template("j"), "other": template("a")}
