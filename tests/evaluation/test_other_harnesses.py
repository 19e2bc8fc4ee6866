"""jvlm eval's arguments; lmms-eval's plug-in against the interface that lmms-eval 0.7 has; scores during training."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from importlib.metadata import entry_points

import pytest
from PIL import Image

from jvlm.cli import eval as eval_command
from jvlm.errors import UserError
from jvlm.evaluation.clients import FAILED
from jvlm.swift import words as swift_words
from jvlm.swift.eval_arguments import EvalArguments
from jvlm.training.config import EvaluationConfig
from tests.evaluation import benchmarks
from tests.evaluation.benchmarks import Scripted


def test_arguments_of_ms_swift_become_those_of_evaluate():
    words = "--eval_url http://127.0.0.1:1/v1 --eval_backend VLMEvalKit --eval_dataset MMMU_DEV_VAL docvqa_val"
    words += " --eval_limit 9 --eval_num_proc 4"
    more = ["--eval_generation_config", '{"max_tokens": 99, "temperature": 0}']
    options = eval_command.options(swift_words.parse(EvalArguments, words.split() + more, "jvlm eval").arguments)
    assert (options.model, options.tasks) == ("http://127.0.0.1:1/v1", ("mmmu_val", "docvqa_val"))
    assert (options.limit, options.concurrency, options.max_new_tokens, options.temperature) == (9, 4, 99, 0)
    with pytest.raises(UserError, match="either --model, or --eval_url"):
        eval_command.options(EvalArguments())
    with pytest.raises(UserError, match="top_q: known are"):
        eval_command.options(EvalArguments(model="x", eval_generation_config='{"top_q": 1}'))


@pytest.fixture
def lmms_eval(monkeypatch):
    """lmms-eval's base class and manifest, as far as a plug-in meets them."""
    modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")}
    modules |= {name: types.ModuleType(name) for name in ("lmms_eval.models", "lmms_eval.models.registry_v2")}

    class lmms:
        is_simple = True

        def __init__(self):
            self.task_dict = {}

    modules["lmms_eval.api.model"].lmms = lmms
    modules["lmms_eval.models.registry_v2"].ModelManifest = lambda **fields: types.SimpleNamespace(**fields)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("jvlm.evaluation.lmms_eval_model", None)


def test_lmms_eval_finds_a_model_that_answers_its_requests_in_order(lmms_eval, monkeypatch):
    from jvlm.evaluation.lmms_eval_plugin import manifest

    name, _, attribute = manifest().chat_class_path.rpartition(".")
    module = importlib.import_module(name)
    client = Scripted(lambda text: None if "2" in text else f"said {text}")
    monkeypatch.setattr(module, "client", lambda options: client)
    model = getattr(module, attribute)(model="folder", batch_size="4", device="cuda")
    with pytest.raises(UserError, match=r"--model_args quantize: known are model, adapter"):
        getattr(module, attribute)(model="folder", quantize="int4")
    docs = [{"n": n} for n in range(3)]
    model.task_dict = {"task": {"test": docs}}

    def messages(doc):
        picture = {"type": "image", "url": Image.new("RGB", (28, 28))}
        return [{"role": "user", "content": [picture, {"type": "text", "text": f"number {doc['n']}"}]}]

    settings = [{"max_new_tokens": 4 + n % 2, "temperature": 0, "until": ["ber 1", "\n\n"]} for n in range(3)]
    requests = [types.SimpleNamespace(args=("", messages, settings[n], n, "task", "test")) for n in range(3)]
    answers = model.generate_until(requests)
    assert answers[:2] == ["said <image>number 0", "said <image>num"]
    assert answers[2].startswith(FAILED)
    assert getattr(module, attribute).is_simple is False


def test_the_plug_in_is_an_entry_point():
    found = [one for one in entry_points(group="lmms_eval.models") if one.name == "jvlm"]
    assert not found or found[0].value == "jvlm.evaluation.lmms_eval_plugin:manifest"
    text = (benchmarks.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'jvlm = "jvlm.evaluation.lmms_eval_plugin:manifest"' in text


def test_tasks_during_training_need_their_data():
    with pytest.raises(UserError, match=r"evaluation\.tasks needs evaluation\.tasks_data"):
        EvaluationConfig(tasks=("docvqa_val",))


@pytest.mark.slow
def test_tasks_are_scored_every_few_steps_with_their_interval_in_the_log(tmp_path):
    from tests.training import support

    benchmarks.docvqa(tmp_path / "data")
    examples = support.write_examples(tmp_path, 4)
    options = ("--evaluation.tasks", "docvqa_val", "--evaluation.tasks_data", str(tmp_path / "data"))
    options += ("--evaluation.tasks_interval_steps", "2", "--evaluation.tasks_limit", "2", "--steps", "2")
    experiment = support.experiment(tmp_path, examples, *options)
    from jvlm.training.runs import train

    result = train(experiment)
    lines = [json.loads(line) for line in (result.folder / "logging.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "eval_docvqa_val" in line]
    assert line["eval_docvqa_val_low"] <= line["eval_docvqa_val"] <= line["eval_docvqa_val_high"]
    assert (result.folder / "tasks" / "step-2" / "docvqa_val" / "score.json").is_file()


@pytest.mark.slow
def test_a_step_that_is_scored_again_with_other_weights_keeps_both_and_asks_nothing_twice(tiny, tmp_path, capsys):
    """A run that was killed behind its last checkpoint scores steps again, with other weights where devices differ."""
    from jvlm.training.task_scores import TaskScores
    from jvlm.training.trainer import split

    benchmarks.docvqa(tmp_path / "data")
    config = EvaluationConfig(
        tasks=("docvqa_val",),
        tasks_data=str(tmp_path / "data"),
        tasks_interval_steps=2,
        tasks_limit=2,
        tasks_max_new_tokens=3,
        batch_size=2,
    )
    hook = TaskScores(config, tiny.processor, tmp_path)
    template, params = split(tiny.model)
    others = {**params, "decoder.norm.scale": 3 * params["decoder.norm.scale"]}
    logged = []

    def score(step, values):
        state = types.SimpleNamespace(params=values)
        trainer = types.SimpleNamespace(step=step, template=template, state=state, evaluated=logged.append)
        trainer.evaluated_params = dict
        hook.on_step_end(trainer, None)

    score(1, params)
    assert logged == []
    score(2, params)
    answers = tmp_path / "tasks" / "step-2" / "docvqa_val" / "answers.jsonl"
    first = answers.read_bytes()
    assert all(json.loads(line)["completion_tokens"] <= 3 for line in first.splitlines())
    assert json.loads((answers.parent / "settings.json").read_text())["decoding"]["max_new_tokens"] == 3
    score(2, params)
    assert answers.read_bytes() == first
    assert logged[0] == logged[1]
    score(2, others)
    assert "scored before with other weights" in capsys.readouterr().out
    assert (tmp_path / "tasks" / "step-2.before-1" / "docvqa_val" / "answers.jsonl").read_bytes() == first
    assert len(answers.read_bytes().splitlines()) == 2
    parts = ("", "_low", "_high", "_unread", "_cut", "_failed")
    assert set(logged[2]) == {f"docvqa_val{part}" for part in parts}
    shutil.rmtree(tmp_path / "data")
    score(4, params)
    assert "docvqa_val is not scored after step 4: --data" in capsys.readouterr().out
    assert logged[3] == {"docvqa_val_unscored": 1.0}
