"""Training other families: one compilation whatever the media, a loss that falls, a folder that transformers reads."""

import functools
import json

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)

import jvlm
from jvlm import configs
from jvlm.training import runs
from tests.families import idefics3, qwen2_vl, qwen3_vl
from tests.families.oracle import user
from tests.support import hf_inputs, picture, raw_tensors
from tests.training import support

pytestmark = pytest.mark.slow
STEPS = 8
FIELDS = {
    "--name": "run",
    "--data.batch_size": "2",
    "--data.seq_len": "384",
    "--data.max_patches": "256",
    "--data.max_image_patches": "128",
    "--data.pack_window": "6",
    "--data.read_threads": "1",
    "--optimizer.learning_rate": "3e-3",
    "--gradient_accumulation_steps": "1",
    "--parallel.context": "1",
    "--steps": str(STEPS),
    "--log_interval_steps": "1",
}


def _qwen3_vl(folder, tokenizer, kind="qwen3_vl"):
    return qwen3_vl.Tiny.create(folder, tokenizer, kind)


def _smolvlm(folder, _):
    return idefics3.create(folder, "smolvlm")


# a checkpoint, the recipe, transformers' model, what its processor gives
KINDS = {
    "smolvlm": (_smolvlm, "smolvlm/256m_full", SmolVLMForConditionalGeneration, idefics3.inputs_of),
    "qwen2_vl": (qwen2_vl.create, "qwen2_vl/7b_full", Qwen2VLForConditionalGeneration, hf_inputs),
    "qwen3_vl": (_qwen3_vl, "qwen3_vl/8b_full", Qwen3VLForConditionalGeneration, qwen3_vl.inputs_of),
    "qwen3_vl_moe": (
        functools.partial(_qwen3_vl, kind="qwen3_vl_moe"),
        "qwen3_vl/30b_a3b",
        Qwen3VLMoeForConditionalGeneration,
        qwen3_vl.inputs_of,
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, tokenizer_folder):
    """A short run on examples with no image, one, two, and a video: (checkpoint, result, folder, kind)."""
    create, recipe, *kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tiny = create(folder / "start", tokenizer_folder)
    path = support.write_examples(folder / "data", 24)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::4]:
        messages = [{"role": "user", "content": "<video>what happens?"}, {"role": "assistant", "content": "no"}]
        row |= {"messages": messages, "images": [], "videos": [["1_0.png", "1_0.png", "1_0.png"]]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {**FIELDS, "--init_from": str(folder / "start"), "--output_root": str(folder), "--data.train": str(path)}
    experiment = configs.load(recipe, [value for pair in fields.items() for value in pair])
    return tiny, runs.train(experiment), folder, kind


def test_images_and_videos_need_one_compilation_and_the_loss_falls(run):
    _, result, folder, _ = run
    assert result.compilations == 1
    losses = list(support.losses(folder).values())
    assert len(losses) == STEPS
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


def test_what_was_trained_is_read_by_transformers_and_has_the_same_logits(run, tmp_path):
    tiny, result, _, (model_type, inputs_of) = run
    jvlm.save(result.model, result.processor, tmp_path, format="hf")
    assert raw_tensors(tmp_path).keys() == raw_tensors(tiny.folder).keys()
    trained = model_type.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    example = user("<image>what is it?", images=[picture(96, 64)])
    inputs, batch = inputs_of(tiny, example), result.processor.pack([example], seq_len=256, max_patches=256)
    n = int((batch.segment_ids > 0).sum())
    with torch.no_grad():
        expected = trained(**inputs).logits.numpy()[0]
        before = tiny.torch_model(**inputs).logits.numpy()[0]
    model, _ = jvlm.load(tmp_path)
    np.testing.assert_allclose(np.asarray(model(batch))[0, :n], expected, atol=2e-4)
    assert np.abs(expected - before).max() > 0.1
