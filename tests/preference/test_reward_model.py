"""Reward models: their scores beside transformers', their loss, their folders, their scale and what a check says."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jvlm
from jvlm import cli, configs
from jvlm.adapters import attach
from jvlm.adapters.config import AdapterConfig
from jvlm.data import packing
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode
from jvlm.data.example_source import ExampleSource
from jvlm.data.segments import segment_of
from jvlm.errors import UserError
from jvlm.families.composed.reward_text import save_text
from jvlm.models import vlm
from jvlm.reward_model import check
from jvlm.reward_model.scale import RewardScale
from jvlm.reward_model.scoring import RewardModel
from jvlm.reward_model.task import RewardTask
from jvlm.rl.rewards.models import ModelReward
from jvlm.rl.rewards.source import RewardItem
from jvlm.training import runs
from jvlm.weights import run_dir
from jvlm.weights.labels import with_labels
from tests.preference.support import write_pairs, write_text_model


@pytest.fixture(scope="module")
def model(tiny):
    return with_labels(tiny.model, 1, seed=3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of pairs, with margins."""
    path = write_pairs(tmp_path_factory.mktemp("pairs"), 6)
    lines = [{**json.loads(line), "margin": 0.5 * n} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def examples(tiny, pairs):
    config = DataConfig(train=(str(pairs),), preference="pairs", seq_len=256, max_patches=512)
    source, encode = ExampleSource.of(config), Encode(tiny.processor, config)
    return [one for n in range(6) for one in encode.random_map(source[n], np.random.default_rng(0))]


def test_scores_are_what_the_matrix_makes_of_the_last_token_in_transformers(tiny, model, pairs):
    """Of conversations packed into one sequence, with pictures, beside each by itself."""
    import torch

    conversations = [json.loads(line) for line in pairs.read_text().splitlines()[:3]]
    for one in conversations:
        one["images"] = [str(pairs.parent / image) for image in one["images"]]
    found = RewardModel(model, tiny.processor).scores(conversations)
    matrix = np.asarray(vlm.parameters(model)["decoder.score.kernel"].get_value())
    for conversation, score in zip(conversations, found, strict=True):
        example = tiny.processor.encode(conversation)
        batch = packing.assemble([[example]], example.length, max(example.num_patches, 64), patch_values=1176)
        ours = np.asarray(jax.jit(lambda b: tiny.model.hidden(b).hidden)(batch))[0, -1] @ matrix[:, 0]
        assert score == pytest.approx(float(ours), abs=2e-4)
        if example.num_patches == 0:
            with torch.no_grad():
                ids = torch.tensor(example.tokens[None].astype(np.int64))
                hidden = tiny.torch_model.model(input_ids=ids).last_hidden_state[0, -1].numpy()
            assert score == pytest.approx(float(hidden @ matrix[:, 0]), abs=1e-4)


def test_packed_pairs_have_the_loss_of_scores_by_themselves(tiny, model, examples):
    task, alone = RewardTask(centre=0.1), RewardModel(model, tiny.processor)
    scores = np.asarray([alone.scores_of([segment_of(e, n) for n in (1, 2)]) for e in examples])
    margin = 0.5 * np.arange(6)
    difference = scores[:, 0] - scores[:, 1]
    expected = np.log1p(np.exp(margin - difference)) + 0.1 * scores.sum(1) ** 2
    sequences = [examples[:3], examples[3:]]
    packed = packing.packed_sequences(packing.assemble(sequences, 384, 768), sequences, (), ())
    batch = jax.tree.map(jnp.asarray, task.batch_of(packed))
    loss = jax.jit(lambda: task.loss(model, batch))()
    assert float(loss.total / loss.weight) == pytest.approx(expected.mean(), abs=1e-4)
    assert float(loss.metrics["accuracy"].sum) == (difference > 0).sum()
    assert float(loss.metrics["margin"].sum) == pytest.approx(difference.sum(), abs=1e-3)


def test_a_folder_holds_the_scores_in_transformers_layout(tiny, model, tmp_path):
    jvlm.save(model, tiny.processor, tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["architectures"] == ["Qwen2_5_VLForSequenceClassification"]
    assert (values["num_labels"], values["id2label"]) == (1, {"0": "LABEL_0"})
    loaded, _ = jvlm.load(tmp_path / "saved")
    before, after = (vlm.parameters(m) for m in (model, loaded))
    assert before.keys() == after.keys()
    assert "decoder.head.kernel" not in after
    assert all(np.array_equal(before[path].get_value(), after[path].get_value()) for path in before)
    with pytest.raises(UserError, match="no next token"):
        loaded.decoder.output_kernel()


def test_adapters_of_a_reward_model_are_merged_when_it_is_read(tiny, model, pairs, tmp_path):
    config = AdapterConfig(rank=4, alpha=8.0, targets=("all-linear",), exclude=("encoder",), train_modules=("score",))
    adapted = attach.attach(model, config, seed=1)
    draw = np.random.default_rng(2)
    values = {
        path: v.get_value()
        + 0.05 * draw.standard_normal(v.get_value().shape, np.float32) * path.endswith((".adapter.a", ".adapter.b"))
        for path, v in vlm.variables(adapted).items()
    }
    adapted = vlm.bind(adapted, values)
    run_dir.save(adapted, tiny.processor, tmp_path / "run")
    loaded = RewardModel.load(tmp_path / "run")
    assert loaded.model.adapters is None
    conversations = [json.loads(line) for line in pairs.read_text().splitlines()[:3]]
    for one in conversations:
        one["images"] = [str(pairs.parent / image) for image in one["images"]]
    expected = RewardModel(adapted, tiny.processor).scores(conversations)
    assert loaded.scores(conversations) == pytest.approx(expected, abs=2e-4)
    plain = RewardModel(model, tiny.processor).scores(conversations)
    assert not np.allclose(plain, expected, atol=1e-2)


def test_a_check_sees_length_and_blindness_and_its_scale_stays_with_the_model(tiny, model, pairs, tmp_path, capsys):
    jvlm.save(model, tiny.processor, tmp_path / "saved")
    words = ["reward-check", str(tmp_path / "saved"), "--data", str(pairs), "--fit_scale"]
    status = cli.main([*words, "--output", str(tmp_path / "check.json")])
    said, values = capsys.readouterr().out, json.loads((tmp_path / "check.json").read_text())
    assert status == (1 if values["warnings"] else 0)
    assert "pictures removed" in said
    assert values["accuracy"]["of"] == 6
    assert values["with_picture"]["of"] == values["without_picture"]["of"] == 4
    loaded = RewardModel.load(tmp_path / "saved")
    question = json.loads(pairs.read_text().splitlines()[0])
    (reward,), (score,) = loaded.rewards([question]), loaded.scores([question])
    assert reward == pytest.approx(1 / (1 + np.exp(-(score - loaded.scale.mean) / loaded.scale.std)), abs=1e-6)
    _check_as_a_source(loaded, pairs)
    with pytest.raises(UserError, match="has no scale"):
        RewardModel(loaded.model, loaded.processor).rewards([question])
    with pytest.raises(UserError, match="saved has no scale"):
        ModelReward(RewardModel(loaded.model, loaded.processor), "saved")


def _check_as_a_source(loaded, pairs):
    """Rewards by task are the model's; thinking is not shown to it, and what cannot be read has no reward."""
    lines = map(json.loads, pairs.read_text().splitlines())
    question = next(line for line in lines if len(line.get("images", ())) == 1)
    (file,) = (str(pairs.parent / image) for image in question["images"])
    (expected,) = loaded.rewards([{**question, "images": [file]}])
    *asked, answered = question["messages"]
    item = RewardItem("a", "say", answered["content"], messages=tuple(asked), images=(Path(file).read_bytes(),))
    parts = [{"type": "image"}, {"type": "text", "text": asked[-1]["content"].removeprefix("<image>")}]
    items = [
        item,
        dataclasses.replace(item, answer=f"<think>hm</think>{item.answer}"),
        dataclasses.replace(item, messages=(*asked[:-1], {"role": "user", "content": parts})),
        dataclasses.replace(item, answer="<think>hm"),
        dataclasses.replace(item, images=(b"no picture",)),
    ]
    scores = ModelReward(loaded, "saved").scores(items)
    assert [score.value for score in scores[:3]] == pytest.approx([expected] * 3, abs=1e-5)
    assert [(score.value, score.reason) for score in scores[3:]] == [(0, "thinking_only"), (None, "service_error")]


class ByLength(RewardModel):
    """Scores each conversation by its tokens alone."""

    def scores_of(self, examples):
        return [float(example.length) for example in examples]


def test_a_model_that_counts_tokens_is_found_out(tiny, model, pairs):
    report = check.check(ByLength(model, tiny.processor), [str(pairs)])
    assert report.length_correlation == pytest.approx(1.0)
    assert report.chosen_shorter.share is None or report.chosen_shorter.share.value == 0
    assert any("follows the length" in warning for warning in report.warnings)
    assert any("does not look at them" in warning for warning in report.warnings)


def test_a_scale_is_monotonic_between_0_and_1():
    scale = RewardScale.fit([-3.0, 0.0, 3.0, 4.0])
    values = [scale(x) for x in (-1e4, -3.0, 1.0, 4.0, 1e4)]
    assert values == sorted(values)
    assert (values[0], values[2], values[-1]) == (0.0, 0.5, 1.0)
    with pytest.raises(UserError, match="do not differ"):
        RewardScale.fit([1.0, 1.0])


@pytest.mark.slow
def test_the_config_of_text_trains_a_language_model_s_folder_to_a_reward_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [
        {"prompt": f"is {n} even?", "chosen": ("yes", "no")[n % 2], "rejected": ("no", "yes")[n % 2]} for n in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    module = configs.module("align/mimo_7b_reward_model")
    module.FOLDER = str(write_text_model(tmp_path / "language_model", 0))
    made = module.get_config()
    data = dataclasses.replace(made.data, train=("pairs.jsonl",), batch_size=2, seq_len=128, pack_window=8)
    optimizer = dataclasses.replace(made.optimizer, learning_rate=3e-3, schedule="constant", warmup_ratio=0.0)
    changes = {"gradient_accumulation_steps": 1, "steps": 20, "log_interval_steps": 1, "output_root": "runs"}
    result = runs.train(dataclasses.replace(made, data=data, optimizer=optimizer, **changes))
    lines = [json.loads(line) for line in (result.folder / "logging.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=0.3)
    assert np.mean([line["loss"] for line in lines[-5:]]) < lines[0]["loss"] - 0.1
    loaded = RewardModel.load(result.folder)
    question = {"role": "user", "content": "is 2 even?"}
    answers = [{"messages": [question, {"role": "assistant", "content": answer}]} for answer in ("yes", "no")]
    scores = loaded.scores(answers)
    assert scores[0] != scores[1]
    save_text(loaded.model, loaded.processor, tmp_path / "hf", base=tmp_path / "language_model")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    matrix = vlm.parameters(loaded.model)["decoder.score.kernel"].get_value()
    np.testing.assert_array_equal(tensors["score.weight"], np.asarray(matrix).T)
    assert "lm_head.weight" not in tensors
