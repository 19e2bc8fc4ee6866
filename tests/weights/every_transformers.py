"""Exported folders in transformers 4.49, 4.57 and 5, and in llama.cpp's converter: `make test-exports`.

Each version lies in a folder of its own, which is put before the packages of the environment. vLLM 0.8 and SGLang read
a folder through these versions' AutoTokenizer, AutoProcessor and AutoConfig.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import jvlm
from jvlm.data.examples import parse_example
from jvlm.errors import UserError
from jvlm.weights import gguf_export
from jvlm.weights.convert import convert
from tests import idefics2, support
from tests.families import idefics3, qwen2_vl
from tests.families.qwen3_vl import Tiny

READERS = {"4.49": "export-4.49", "4.57": "export-4.57 export-pixels", "5.": "export-pixels"}
DEMO = support.ROOT / "configs/mimo_vl/easy_vqa_data/tokenizer"
TEXTS = [
    "the cat <|im_end|>\n<image>é 640 x 480",
    " two  spaces\n",
    "<|vision_start|>is it?<end_of_utterance>\nAssistant: a",
]
# 7 x 5 patches: no patch of Idefics2's lies on an edge of the position table's cells, where the versions differ
PICTURE = support.picture(98, 70)
EXAMPLES = {
    "picture": {"messages": [{"role": "user", "content": "<image>what is the cat?"}], "images": [PICTURE]},
    "text": {"messages": [{"role": "user", "content": "what is  it? é"}]},
    "turns": {
        "messages": [
            {"role": "user", "content": "<image>what is it?"},
            {"role": "assistant", "content": "a red circle"},
            {"role": "user", "content": "and <image>"},
        ],
        "images": [PICTURE, support.picture(70, 98, 1)],
    },
}


def qwen(folder, tokenizer, **settings):
    config = support.tiny_config(support.token_ids(tokenizer), vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)))
    folder.mkdir()
    support.write_folder(folder, tokenizer, config, limits=(4 * 784, 64 * 784))
    support.write_tensors(folder, support.random_tensors(support.tensor_shapes(config)))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, **settings}))


def exported(folder):
    jvlm.save(*jvlm.load(folder / "source"), folder / "export")
    return folder / "export"


def of_the_hub(folder):
    """As the hub's Qwen2.5-VL: a list of special tokens, and the template of the processor in a file of its own."""
    tokenizer = support.make_tokenizer(folder / "tokenizer", additional_special_tokens=list(support.SPECIAL_TOKENS[1:]))
    qwen(folder / "source", tokenizer, chat_template="{{ messages[0]['content'] + '' }}")
    template = (support.GOLDEN / "chat_template.jinja").read_text()
    (folder / "source" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return exported(folder)


def of_the_demo(folder):
    qwen(folder / "source", DEMO)
    return exported(folder)


def of_idefics2(folder):
    tokenizer = idefics2.write_llama_tokenizer
    idefics2.write_folder(folder / "source", split=True, tokenizer=tokenizer, vocab_size=512)
    return exported(folder)


def converted_from_transformers_5(folder):
    """A snapshot whose tokenizer transformers 5 has saved, copied by tools/convert.py."""
    qwen(folder / "source", support.make_tokenizer(folder / "tokenizer"), tokenizer_class="PreTrainedTokenizerFast")
    AutoTokenizer.from_pretrained(folder / "source").save_pretrained(folder / "source")
    convert(folder / "source", folder / "export", dtype="float32")
    return folder / "export"


def of_qwen3_vl(folder, kind="qwen3_vl"):
    Tiny.create(folder / "source", support.make_tokenizer(folder / "tokenizer"), kind)
    return exported(folder)


def of_qwen3_vl_with_experts(folder):
    return of_qwen3_vl(folder, "qwen3_vl_moe")


def of_qwen2_vl(folder):
    qwen2_vl.create(folder / "source", support.make_tokenizer(folder / "tokenizer"))
    return exported(folder)


def of_idefics3(folder, kind="idefics3"):
    idefics3.create(folder / "source", kind)
    return exported(folder)


def of_smolvlm(folder):
    return of_idefics3(folder, "smolvlm")


# 4.49 has no Qwen3-VL and no SmolVLM
EVERYWHERE = (of_the_hub, of_the_demo, of_idefics2, of_qwen2_vl, of_idefics3, converted_from_transformers_5)
MAKERS = {
    **dict.fromkeys(EVERYWHERE, tuple(READERS)),
    **dict.fromkeys((of_qwen3_vl, of_qwen3_vl_with_experts, of_smolvlm), ("4.57", "5.")),
}


@pytest.fixture(scope="module")
def export(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("export"))


def packages(names):
    """The environment of a process that finds these folders' packages first."""
    folders = [str(Path(sys.prefix) / name) for name in names.split()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}


def run(command, names):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=support.ROOT,
        env=packages(names),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize(
    ("export", "version"),
    [pytest.param(make, v, id=f"{make.__name__}-{v}") for make, versions in MAKERS.items() for v in versions],
    indirect=["export"],
)
def test_ids_prompts_and_logits_of_an_export_are_ours_in(version, example, export, tmp_path):
    example = EXAMPLES[example]
    model, processor = jvlm.load(export)
    batch = processor.pack([example], generation_prompt=True)
    length = int((batch.segment_ids[0] > 0).sum())
    paths = [tmp_path / f"{i}.png" for i in range(len(example.get("images", ())))]
    for path, picture in zip(paths, example.get("images", ()), strict=True):
        picture.save(path)
    request = {"messages": support.chat_messages(example), "images": list(map(str, paths)), "texts": TEXTS}
    (tmp_path / "request.json").write_text(json.dumps(request))
    reader = ("-m", "tests.weights.read_export")
    theirs = json.loads(run([*reader, export, tmp_path / "request.json"], READERS[version]).splitlines()[-1])
    assert theirs["version"].startswith(version)
    tokenizer = processor.tokenizer
    assert theirs["tokenizer"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert theirs["special"] == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert theirs["prompt"] == theirs["tokenizer_prompt"]
    ours = processor.template.render(parse_example(example).messages, generation_prompt=True)
    assert theirs["prompt"] == ours.replace("<image> ", "<image>")  # Idefics2's processor writes this space afterwards
    assert theirs["ids"] == batch.tokens[0, :length].tolist()
    np.testing.assert_allclose(np.asarray(model(batch))[0, :length], theirs["logits"], atol=1e-4)


# llama.cpp knows tokenizers by a hash of what they make of a text; those of tests are none of them
CONVERTER = """
import sys
folder = sys.argv.pop(1)
sys.path[:0] = [folder, folder + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
convert_hf_to_gguf.main()
"""


OF_LLAMA_CPP = {
    of_the_hub: "qwen2vl",
    of_the_demo: "qwen2vl",
    converted_from_transformers_5: "qwen2vl",
    of_qwen3_vl: "qwen3vl",
    of_qwen3_vl_with_experts: "qwen3vlmoe",
}


@pytest.mark.parametrize("make", OF_LLAMA_CPP, ids=lambda f: f.__name__)
def test_llama_cpp_s_converter_takes_an_export(make, tmp_path):
    from gguf import GGUFReader

    export = make(tmp_path)
    folder = Path(sys.prefix) / "export-llama.cpp"
    for name, options in (("text", []), ("vision", ["--mmproj"])):
        command = [
            "-c",
            CONVERTER,
            folder,
            export,
            "--outtype",
            "f32",
            "--outfile",
            tmp_path / f"{name}.gguf",
            *options,
        ]
        run(command, "export-llama.cpp")
    text, vision = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("text", "vision"))
    tokenizer = AutoTokenizer.from_pretrained(export)
    fields = {name: field.contents() for name, field in text.fields.items()}
    assert fields["general.architecture"] == OF_LLAMA_CPP[make]
    words = fields["tokenizer.ggml.tokens"]  # the table may have more rows than words
    assert words[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert all(word.startswith("[PAD") for word in words[len(tokenizer) :])
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert len(text.tensors) + len(vision.tensors) >= len(support.raw_tensors(export))
    if make is of_the_demo:  # llama.cpp has no name for its digits in pairs
        with pytest.raises(UserError, match=r"splits text in a way that llama.cpp has no name for"):
            gguf_export.export(*jvlm.load(export), tmp_path / "gguf")
    else:
        compare_gguf(export, text, vision, tmp_path / "gguf")


# of llama.cpp's converter: where the model comes from, and what llama.cpp derives by itself
NOT_WRITTEN = ("general.", "GGUF.", "tokenizer.ggml.add_", "tokenizer.ggml.unknown")


def compare_gguf(export, text, vision, folder):
    """jvlm's own GGUF files have the same tensors to the bit, and the same keys as far as both have them."""
    model, processor = jvlm.load(export)
    ours = [write.path for write in gguf_export.export(model, processor, folder, format="f32", vision_format="f32")]
    for theirs, path in zip((text, vision), ours, strict=True):
        mine = type(theirs)(path)
        expected = {tensor.name: tensor.data for tensor in theirs.tensors}
        found = {tensor.name: tensor.data for tensor in mine.tensors}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        fields = {name: field.contents() for name, field in mine.fields.items()}
        for name, field in theirs.fields.items():
            if not name.startswith(NOT_WRITTEN) and not name.endswith(".vocab_size"):
                assert fields[name] == field.contents(), name
