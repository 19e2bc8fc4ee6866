"""Qwen3-VL computes what transformers computes, on random small checkpoints in float32."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from flax import nnx
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize

import jvlm
from jvlm import families
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.adapters.targets import resolve
from jvlm.data.boxes import Box, Sizes
from jvlm.data.content import Conversation, Message, Text, Video
from jvlm.data.video.sampling import by_number
from jvlm.errors import UserError
from jvlm.families.qwen3_vl.chat_format import TEMPLATE
from jvlm.families.qwen3_vl.image_processor import Qwen3ImageConfig
from jvlm.models import vlm
from jvlm.weights import table
from jvlm.weights.convert import convert
from jvlm.weights.gguf_export import write_lora, write_text, write_vision
from jvlm.weights.safetensors_files import joined
from tests.families.oracle import check_packed_equals_alone, cross_entropy, prompt_of, several_turns, torch_loss, user
from tests.families.qwen3_vl import CLASSES, Tiny, frames, inputs_of
from tests.support import GOLDEN, picture, raw_tensors

SHAPE = {"seq_len": 256, "max_patches": 384}
CASES = {
    "text alone": user("what is the answer?"),
    "an image that is resized": user("<image>what is it?", images=[picture(333, 187)]),
    "images of different sizes": user(
        "<image>is the <image>cat in both?<image>", images=[picture(64, 96), picture(160, 32, 1), picture(96, 96, 2)]
    ),
    "several turns and a system prompt": several_turns(picture(96, 64), picture(64, 128, 3)),
    "a video behind words": user("where is the cat:<video>describe this video", videos=[frames(4)]),
    "a video with an incomplete pair, then an image": user(
        "<video>and <image> is?", videos=[frames(5)], images=[picture(128, 64)]
    ),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer_folder):
    return Tiny.create(tmp_path_factory.mktemp("dense"), tokenizer_folder, "qwen3_vl")


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tokenizer_folder):
    return Tiny.create(tmp_path_factory.mktemp("experts"), tokenizer_folder, "qwen3_vl_moe")


def check_logits(tiny, example):
    batch, inputs = tiny.processor.pack([example], **SHAPE), inputs_of(tiny, example)
    n = int((batch.segment_ids > 0).sum())
    np.testing.assert_array_equal(batch.tokens[0, :n], inputs["input_ids"][0])
    with torch.no_grad():
        expected = tiny.torch_model(**inputs).logits.numpy()[0]
    np.testing.assert_allclose(np.asarray(tiny.model(batch))[0, :n], expected, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_equal_transformers(dense, name):
    check_logits(dense, CASES[name])


@pytest.mark.parametrize("name", ["an image that is resized", "a video with an incomplete pair, then an image"])
def test_tokens_and_logits_of_a_mixture_of_experts_equal_transformers(experts, name):
    check_logits(experts, CASES[name])


def test_pixels_and_every_deepstack_level_equal_transformers(dense):
    example = CASES["images of different sizes"]
    batch, inputs = dense.processor.pack([example], **SHAPE), inputs_of(dense, example)
    patches = inputs["pixel_values"].numpy()
    ours = batch.patches[0, : len(patches)].astype(np.float32) / 255 * 2 - 1
    np.testing.assert_allclose(ours, patches, atol=1e-6)
    with torch.no_grad():
        expected = dense.torch_model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    got = nnx.jit(lambda model, b: model.encode(b))(dense.model, batch)
    index = batch.vision_index[0]
    index = index[index >= 0]
    np.testing.assert_allclose(np.asarray(got.tokens)[0, index], expected.pooler_output.numpy(), atol=1e-4)
    assert len(got.deepstack) == len(expected.deepstack_features) == 2
    for level, wanted in zip(got.deepstack, expected.deepstack_features, strict=True):
        np.testing.assert_allclose(np.asarray(level)[0, index], wanted.numpy(), atol=1e-4)


def test_conversations_in_one_sequence_have_the_logits_that_each_has_alone(dense):
    examples = [CASES[name] for name in ("text alone", "an image that is resized", "a video behind words")]
    check_packed_equals_alone(dense, examples, SHAPE)


@pytest.mark.parametrize(
    "kind", ["dense", pytest.param("experts", marks=pytest.mark.slow), pytest.param("remat", marks=pytest.mark.slow)]
)
def test_gradients_of_every_tensor_equal_torch(kind, request):
    tiny = request.getfixturevalue("experts" if kind == "experts" else "dense")
    model = tiny.model
    if kind == "remat":
        precision = dataclasses.replace(model.config.precision, remat="full")
        again = vlm.abstract(dataclasses.replace(model.config, precision=precision))
        model = vlm.bind(again, {path: v.get_value() for path, v in vlm.parameters(model).items()})
    names = ("text alone", "images of different sizes", "a video behind words")
    examples = [CASES[name] for name in names]
    batch = tiny.processor.pack(examples, **SHAPE)
    loss, grads = nnx.jit(nnx.value_and_grad(lambda model, b: cross_entropy(model(b), b)))(model, batch)
    assert float(loss) == pytest.approx(torch_loss(tiny, examples, batch, inputs_of), rel=1e-5)
    flat = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(grads)}
    entries = table.entries(tiny.model.config, {p: tuple(v.shape) for p, v in flat.items()})
    ours = {}
    for entry in entries:
        value = flat[entry.path]
        ours[entry.name] = entry.to_checkpoint(np.asarray(value if entry.layer is None else value[entry.layer]))
    for name, parameter in tiny.torch_model.named_parameters():
        wanted = parameter.grad.numpy()
        if name.endswith("experts.gate_up_proj"):  # transformers has outputs before inputs in memory
            parts = [ours.pop(name.replace("gate_up", part)) for part in ("gate", "up")]
            value = np.concatenate(parts, -1).swapaxes(1, 2)
        elif name.endswith("experts.down_proj"):
            value = ours.pop(name).swapaxes(1, 2)
        else:
            value = ours.pop(name)
        error = np.linalg.norm(value - wanted) / max(np.linalg.norm(wanted), 1e-3)
        assert error < 1e-3, (name, error)
    assert not ours


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_round_trip_is_byte_identical_and_read_by_transformers(kind, request, tmp_path):
    tiny = request.getfixturevalue(kind)
    jvlm.save(tiny.model, tiny.processor, tmp_path / "saved")
    assert raw_tensors(tmp_path / "saved") == raw_tensors(tiny.folder)
    _, model_type = CLASSES[tiny.config["model_type"]]
    again, report = model_type.from_pretrained(str(tmp_path / "saved"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for (name, value), (_, expected) in zip(again.named_parameters(), tiny.torch_model.named_parameters(), strict=True):
        assert torch.equal(value, expected), name
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        before, after = (json.loads((folder / file).read_text()) for folder in (tiny.folder, tmp_path / "saved"))
        assert {**after, "image_processor_type": 0} == {**after, **before, "image_processor_type": 0}
    assert families.get("qwen3_vl").hf.read_config(
        json.loads((tmp_path / "saved" / "config.json").read_text())
    ) == families.get("qwen3_vl").hf.read_config(tiny.config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_conversion_is_byte_identical(kind, request, tmp_path):
    tiny = request.getfixturevalue(kind)
    convert(tiny.folder, tmp_path / "converted", max_shard_bytes=100_000)
    assert raw_tensors(tmp_path / "converted") == raw_tensors(tiny.folder)


# Parameters. Public files give those of the 8B and of all larger models, and the 1,058 tensors of the 32B; those of the
# 2B and 4B are what transformers' own class has.
PUBLISHED = {
    "qwen3_vl_2b": 2_127_532_032,
    "qwen3_vl_4b": 4_437_815_808,
    "qwen3_vl_8b": 8_767_123_696,
    "qwen3_vl_32b": 33_357_390_064,
    "qwen3_vl_30b_a3b": 31_070_754_032,
    "qwen3_vl_235b_a22b": 235_670_022_896,
}


@pytest.mark.parametrize("name", families.get("qwen3_vl").presets)
def test_names_shapes_and_counts_of_presets_are_the_published_ones(name):
    config = families.preset(name)
    form = families.get("qwen3_vl").hf
    values = form.write_config(config)
    assert form.read_config(values) == config
    config_type, model_type = CLASSES[values["model_type"]]
    with torch.device("meta"):
        model = model_type(config_type(**values))
    # in files, experts have inputs before outputs
    expected = {
        n: (p.shape[0], p.shape[2], p.shape[1]) if ".experts." in n else tuple(p.shape)
        for n, p in model.named_parameters()
    }
    model = vlm.abstract(config)
    shapes = {path: tuple(v.get_value().shape) for path, v in vlm.parameters(model).items()}
    tensors = [(e.name, np.dtype("float32"), e.shape, None) for e in table.entries(config, shapes)]
    assert {name: tuple(shape) for name, _, shape, _ in joined(tensors, form.fused)} == expected
    assert sum(vlm.parameter_counts(model).values()) == PUBLISHED[name]
    assert name != "qwen3_vl_32b" or len(expected) == 1058


@pytest.mark.parametrize("size", [(640, 480), (1920, 1080), (20, 300), (97, 33), (4000, 100)])
@pytest.mark.parametrize("count", [2, 3, 5, 16, 101])
@pytest.mark.parametrize("cap", [False, True])
def test_frames_have_the_size_that_transformers_gives_them(size, count, cap):
    settings = Qwen3ImageConfig(cap_frames=cap, video_max_pixels=3_000_000)
    most = settings.video_max_pixels
    if cap:
        most = max(min(768 * 1024, most // count), int(settings.video_min_pixels * 1.05)) * count
    width, height = size
    wanted = smart_resize(count, height, width, 2, 32, settings.video_min_pixels, most)
    assert settings.video_size(32, 2, count, width, height)[::-1] == wanted


@pytest.mark.parametrize(("total", "rate"), [(90, 30.0), (300, 29.97), (7, 25.0), (3000, 24.0), (61, 12.5)])
def test_the_frames_that_transformers_takes_are_taken(total, rate):
    settings = types.SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    metadata = types.SimpleNamespace(total_num_frames=total, fps=rate)
    expected = Qwen3VLVideoProcessor.sample_frames(settings, metadata)
    assert list(by_number(total, rate, Qwen3ImageConfig().sampling()).indices) == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_greedy_answers_equal_transformers(kind, request):
    tiny = request.getfixturevalue(kind)
    examples = [prompt_of(example) for example in CASES.values()]
    found = [[] for _ in examples]
    options = {"max_new_tokens": 10, "batch_size": 4}
    jvlm.generate(tiny.model, tiny.processor, examples, on_token=lambda i, t: found[i].append(t), **options)
    never = [*tiny.model.config.media_token_ids, *range(len(tiny.processor.tokenizer), 352)]
    for example, tokens in zip(examples, found, strict=True):
        inputs = inputs_of(tiny, example, generation_prompt=True)
        plain = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": never}
        expected = tiny.torch_model.generate(**inputs, **plain)[0, inputs["input_ids"].shape[1] :]
        assert tokens == expected.tolist()


def test_times_are_those_of_the_frames_and_boxes_are_thousandths(dense, tmp_path):
    processor = dense.processor
    video = Video(tuple(frames(4)), fps=30.0, times=(0.0, 1.02, 2.04, 9.4))
    example = processor.encode(Conversation((Message("user", (Text("see:"), video)), Message("assistant", "yes"))))
    text = processor.tokenizer.decode(example.tokens)
    once = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    assert f"see:<0.5 seconds>{once}<5.7 seconds>{once}<|im_end|>" in text
    # each pair of frames is an image of its own to M-RoPE
    starts = np.flatnonzero(np.diff(example.vision_index >= 0, prepend=0) == 1)
    first, second = (example.positions[start : start + 6] for start in starts)
    np.testing.assert_array_equal(first - first[0], [[0, h, w] for h in range(2) for w in range(3)])
    np.testing.assert_array_equal(second - second[0], first - first[0])
    sizes = Sizes((640, 480), (640, 480))
    assert processor.write_region(Box(64, 0, 640, 360, "original"), sizes) == "[100, 0, 1000, 750]"
    (found,) = processor.read_regions('```json\n[{"bbox_2d": [100, 0, 1000, 750], "label": "cat"}]\n```')
    assert found.region.to("original", sizes).values == (64, 0, 640, 360)


def test_the_template_for_tokenizers_without_one_writes_what_the_published_one_does(dense):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    written = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bergen"}'}}
    media = [{"type": "image"}, {"type": "text", "text": "weather?"}, {"type": "video"}]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": media},
        {"role": "assistant", "content": "I ask.", "tool_calls": [call, written]},
        {"role": "tool", "content": "22"},
        {"role": "tool", "content": [{"type": "text", "text": "23"}, {"type": "image"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "24"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is warm."}]},
        {"role": "user", "content": "Thanks"},
    ]
    published = (GOLDEN / "chat_templates/qwen3_vl.jinja").read_text()
    tokenizer = dense.processor.tokenizer
    for begin, end in ((0, 2), (1, 2), (0, 3), (1, 5), (0, 7), (0, 8), (0, 9)):
        for given in (tools, None):
            options = {"tools": given, "tokenize": False, "add_generation_prompt": chat[end - 1]["role"] != "assistant"}
            ours, theirs = (
                tokenizer.apply_chat_template(chat[begin:end], chat_template=template, **options)
                for template in (TEMPLATE, published)
            )
            assert ours == theirs


def test_pixels_of_videos_are_laid_out_as_transformers_does_after_the_resize(dense):
    images = frames(5, 200, 150)
    settings = dataclasses.replace(dense.processor.image_config, video_max_pixels=60_000)
    media = dense.processor.image_processor.video(images, settings)
    width, height = media.resized
    assert (height, width) == smart_resize(5, 150, 200, 2, 32, settings.video_min_pixels, 60_000)
    pixels = np.stack([np.asarray(image.resize((width, height), 3)) for image in images])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2)[None]
    patches, *grid = Qwen3VLVideoProcessor.patchify(None, values, 16, 2, 2)
    np.testing.assert_array_equal(media.patches, patches[0].numpy())
    assert grid == [3, height // 16, width // 16]


def test_adapters_are_put_on_every_tower_and_written_under_the_names_of_peft(dense, tmp_path):
    targets = ("encoder", "connector", "decoder")
    plan = resolve(AdapterConfig(rank=2, targets=targets), dense.model.config)
    model = attach(dense.model, AdapterConfig(rank=2, targets=targets))
    assert model.adapters == plan
    write_peft(extract(model), model.config, tmp_path, base_name="org/base")
    modules = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in raw_tensors(tmp_path)
        if name.endswith("lora_A.weight")
    }
    # linear layers of all blocks and mergers; not the patch embedding, and not the head
    expected = {
        name
        for name, module in dense.torch_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert modules == expected


def test_gguf_files_hold_every_expert_and_every_deepstack_merger(experts, tmp_path):
    """Names are those of llama.cpp's converter, which `every_transformers` runs itself; values are those of torch."""
    write_text(experts.model, tmp_path / "text.gguf", format="q8_0")
    write_vision(experts.model, tmp_path / "vision.gguf", format="f32")
    text, vision = GGUFReader(tmp_path / "text.gguf"), GGUFReader(tmp_path / "vision.gguf")
    fields = {name: field.contents() for name, field in text.fields.items()}
    assert fields["general.architecture"] == "qwen3vlmoe"
    sizes = [
        fields[f"qwen3vlmoe.{name}"] for name in ("expert_count", "expert_used_count", "expert_feed_forward_length")
    ]
    assert (sizes, fields["qwen3vlmoe.n_deepstack_layers"]) == ([6, 2, 24], 2)
    values = {name: value.detach().numpy() for name, value in experts.torch_model.state_dict().items()}
    tensors, matrices = {tensor.name: tensor for tensor in text.tensors}, GGMLQuantizationType
    for layer in range(4):
        mlp = f"model.language_model.layers.{layer}.mlp"
        joint = values[f"{mlp}.experts.gate_up_proj"]
        wanted = {
            "ffn_gate_exps": (matrices.Q8_0, joint[:, :24]),
            "ffn_up_exps": (matrices.Q8_0, joint[:, 24:]),
            "ffn_down_exps": (matrices.F16, values[f"{mlp}.experts.down_proj"]),  # rows of 24 are no block of 32
            "ffn_gate_inp": (matrices.F32, values[f"{mlp}.gate.weight"]),
        }
        for name, (kind, expected) in wanted.items():
            found = tensors[f"blk.{layer}.{name}.weight"]
            assert found.tensor_type == kind
            value = dequantize(found.data, kind).reshape(expected.shape)
            assert np.linalg.norm(value - expected) < 0.0065 * np.linalg.norm(expected)
    held = {tensor.name: tensor.data for tensor in vision.tensors}
    assert vision.fields["clip.vision.is_deepstack_layers"].contents() == [True, False, True, False]
    for level, layer in enumerate((0, 2)):
        for ours, theirs in (("norm", "norm"), ("fc1", "linear_fc1"), ("fc2", "linear_fc2")):
            expected = values[f"model.visual.deepstack_merger_list.{level}.{theirs}.weight"]
            np.testing.assert_array_equal(held[f"v.deepstack.{layer}.{ours}.weight"], expected)
    np.testing.assert_array_equal(held["v.position_embd.weight"], values["model.visual.pos_embed.weight"])


def test_an_adapter_of_experts_is_refused_as_a_gguf_file(experts, tmp_path):
    weights = extract(attach(experts.model, AdapterConfig(rank=2, targets=("decoder.mlp",))))
    with pytest.raises(UserError, match=r"(?s)cannot load this adapter; merge it.*of experts: 72"):
        write_lora(weights, experts.model.config, tmp_path / "a.gguf")
