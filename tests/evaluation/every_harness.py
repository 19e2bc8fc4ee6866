"""The scores of lmms-eval, VLMEvalKit and EvalScope beside those of jvlm evaluate: `make test-harnesses`.

Each is in an environment of its own. The model is small and random, so right answers are made from what it says: the
same, nearly the same, another.
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from jvlm import cli
from jvlm.evaluation.store import AnswerStore
from jvlm.json_files import read_object
from jvlm.scoring.benchmarks import ocrbench_v2
from tests.evaluation.benchmarks import parquet
from tests.support import ROOT

ENVIRONMENT = ROOT / ".venv" / "harness-lmms-eval"
EVALSCOPE = ROOT / ".venv" / "harness-evalscope" / "bin" / "evalscope"
VLMEVALKIT = ROOT / ".venv" / "harness-vlmevalkit" / "bin" / "python"
PROGRAM = "tests.evaluation.run_vlmevalkit"
TOKENS, COUNT = 12, 9
PARQUET = "lmms-lab/DocVQA/DocVQA/validation-00000-of-00001.parquet"

TASK = """
task: docvqa_here
dataset_path: parquet
dataset_kwargs: {{data_files: {{validation: "{file}"}}}}
test_split: validation
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answers
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
metric_list: [{{metric: anls, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0}}
"""
UTILS = """
import io
from PIL import Image

def pictures(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]

def question(doc, *_):
    return doc["question"] + "\\nAnswer the question using a single word or phrase."
"""


# EvalScope's words, and its text before the picture, as a task of a user's own
OWN = """
from jvlm.data.content import Text
from jvlm.evaluation.files import hub
from jvlm.evaluation.task import Item, Task

PROMPT = {prompt!r}


def item(row):
    shown = (Text(PROMPT.format(question=row.text("question"))), *row.images("image"))
    return Item(row.text("questionId"), shown, row.list("answers"))


TASKS = [Task("docvqa_as_evalscope", "own", (hub("lmms-lab/DocVQA", "DocVQA/validation-*.parquet"),), item, "anls")]
"""
# what the snapshot's card says of its files
CARD = """---
configs:
- config_name: DocVQA
  data_files:
  - split: validation
    path: DocVQA/validation-*
---
"""


def grey(number: int) -> dict:
    """A picture of one grey, a hundred pixels wide at least."""
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), (10 + 20 * number,) * 3).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def rows(answers: list[str]) -> list[dict]:
    said = [text.strip() for text in answers]
    golds = [(text, f"{text[:-2]}qz", "something else entirely")[n % 3] for n, text in enumerate(said)]
    return [
        {"questionId": str(n), "question": f"what is the number {n}?", "docId": n, "image": grey(n)}
        | {"answers": [gold, "zzzz"]}
        for n, gold in enumerate(golds)
    ]


@pytest.fixture(scope="module")
def served(tiny):
    """The address of `jvlm serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jvlm.cli", "serve", str(tiny.folder), "--port", str(port)]
    sizes = ["--max-model-len", "256", "--max-num-seqs", "4", "--served-model-name", "toy"]
    process = subprocess.Popen([*command, *sizes], cwd=ROOT, start_new_session=True)
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ours(model: str, data: Path, output: Path, task: str = "docvqa_val", *more: str) -> tuple[float, dict[str, str]]:
    """The score of jvlm evaluate, and the answers by question."""
    words = ["evaluate", "--model", model, "--tasks", task, "--data", str(data), "--output", str(output)]
    assert cli.main([*words, "--max_new_tokens", str(TOKENS), *more]) == 0
    replies = AnswerStore(output / task).read()
    assert not any(one.error for one in replies.values())
    return read_object(output / task / "score.json")["value"], {name: r.text for (name, _), r in replies.items()}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory, served):
    """A folder with DocVQA's file, whose answers the model gives in part, and the same as a task of lmms-eval's."""
    folder = tmp_path_factory.mktemp("benchmark")
    parquet(folder / "first" / PARQUET, rows(["?"] * COUNT))
    _, said = ours(served, folder / "first", folder / "asked")
    parquet(folder / "data" / PARQUET, rows([said[str(n)] for n in range(COUNT)]))
    (folder / "task").mkdir()
    (folder / "task" / "docvqa_here.yaml").write_text(TASK.format(file=folder / "data" / PARQUET, tokens=TOKENS))
    (folder / "task" / "utils.py").write_text(UTILS)
    return folder


def theirs(benchmark: Path, output: Path, model: str, arguments: str) -> tuple[float, dict[str, str]]:
    """The score of lmms-eval, and the answers by question."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ENVIRONMENT, ROOT, ROOT / "kernels"))),
        "HF_HOME": str(output / "hf"),
        "HF_DATASETS_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }
    words = ["--model", model, "--model_args", arguments, "--tasks", "docvqa_here", "--batch_size", "4"]
    words += ["--include_path", str(benchmark / "task"), "--log_samples", "--output_path", str(output / "out")]
    command = [sys.executable, "-m", "lmms_eval", *words]
    done = subprocess.run(command, cwd=output, env=environment, capture_output=True, text=True, timeout=900)
    found = list(output.rglob("*_results.json"))
    assert found, done.stderr[-6000:] + done.stdout[-2000:]
    scores = read_object(found[0])["results"]["docvqa_here"]
    (samples,) = output.rglob("*_samples_docvqa_here.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    said = {str(line["doc_id"]): _text(line["filtered_resps"]) for line in lines}
    return next(value for name, value in scores.items() if name.startswith("anls,")), said


def _text(given) -> str:
    return _text(given[0]) if isinstance(given, list) else given.strip()


def test_lmms_eval_asks_a_server_of_ours_and_finds_the_same_score(benchmark, served, tmp_path):
    value, said = ours(served, benchmark / "data", tmp_path / "ours")
    assert 0.3 < value < 0.7
    arguments = f"model=toy,base_url={served},api_key=EMPTY,num_concurrent=4,timeout=600"
    their_value, their_said = theirs(benchmark, tmp_path, "openai", arguments)
    assert their_said == said
    assert their_value == pytest.approx(value, abs=1e-9)


def test_lmms_eval_finds_our_model_by_its_entry_point(benchmark, tiny, tmp_path):
    value, said = ours(str(tiny.folder), benchmark / "data", tmp_path / "ours")
    their_value, their_said = theirs(benchmark, tmp_path, "jvlm", f"model={tiny.folder}")
    assert their_said == said
    assert their_value == pytest.approx(value, abs=1e-9)


def unchanged_greys(count: int) -> list[int]:
    """Greys that JPEG leaves as they are: VLMEvalKit sends pictures as JPEG."""
    found = []
    for value in range(8, 248, 4):
        buffer = io.BytesIO()
        Image.new("RGB", (112, 112), (value,) * 3).save(buffer, "JPEG")
        if np.all(np.asarray(Image.open(buffer)) == value):
            found.append(value)
    return found[:: len(found) // count][:count]


def table(path: Path, answers: list[str]) -> None:
    """DocVQA as VLMEvalKit's table."""
    lines = ["index\tquestion\tanswer\timage"]
    for row, value in zip(rows(answers), unchanged_greys(COUNT), strict=True):
        buffer = io.BytesIO()
        Image.new("RGB", (112, 112), (value,) * 3).save(buffer, "PNG")
        golds = repr(row["answers"]).replace("\t", " ")
        lines.append(f"{row['questionId']}\t{row['question']}\t{golds}\t{base64.b64encode(buffer.getvalue()).decode()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def test_vlmevalkit_asks_a_server_of_ours_and_finds_the_same_score(served, tmp_path):
    table(tmp_path / "first" / "DocVQA_VAL.tsv", ["?"] * COUNT)
    _, first = ours(served, tmp_path / "first", tmp_path / "asked")
    answers = [first[str(n)] for n in range(COUNT)]
    table(tmp_path / "data" / "DocVQA_VAL.tsv", answers)
    value, said = ours(served, tmp_path / "data", tmp_path / "ours")
    assert 0.3 < value < 0.7
    # another name, because it takes only the published file for DocVQA_VAL
    table(tmp_path / "theirs" / "DocVQA_here.tsv", answers)
    address = {"api_base": f"{served}/chat/completions", "key": "EMPTY", "retry": 1}
    model = {"class": "LMDeployAPI", "model": "toy", **address, "max_tokens": TOKENS, "temperature": 0}
    data = {"class": "ImageVQADataset", "dataset": "DocVQA_here"}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"toy": model}, "data": {"DocVQA_here": data}}))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LMUData": str(tmp_path / "theirs")}
    environment |= {"PYTHONPATH": str(ROOT), "PRED_FORMAT": "tsv", "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    command = [VLMEVALKIT, "-m", PROGRAM, "--config", "config.json", "--work-dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    found = list((tmp_path / "out").rglob("toy_DocVQA_here_acc.csv"))
    assert found, done.stderr[-6000:] + done.stdout[-2000:]
    (predictions,) = (tmp_path / "out").rglob("toy_DocVQA_here.tsv")
    with open(predictions, newline="") as file:
        their_said = {row["index"]: row["prediction"].strip() for row in csv.DictReader(file, delimiter="\t")}
    assert their_said == said
    with open(found[0], newline="") as file:
        (scores,) = csv.DictReader(file)
    assert float(scores["Overall"]) == pytest.approx(100 * value, abs=0.01)


def test_evalscope_asks_a_server_of_ours_and_finds_the_same_score(benchmark, served, tmp_path):
    python = EVALSCOPE.parent / "python"
    asks = "from evalscope.benchmarks.docvqa.docvqa_adapter import PROMPT; import json; print(json.dumps(PROMPT))"
    prompt = subprocess.run([python, "-c", asks], capture_output=True, text=True, check=True, timeout=300).stdout
    (tmp_path / "own.py").write_text(OWN.format(prompt=json.loads(prompt.splitlines()[-1])))
    more = ("docvqa_as_evalscope", "--include", str(tmp_path / "own.py"))
    _, first = ours(served, benchmark / "data", tmp_path / "asked", *more)
    snapshot = tmp_path / "data" / "lmms-lab" / "DocVQA"
    parquet(tmp_path / "data" / PARQUET, rows([first[str(n)] for n in range(COUNT)]))
    (snapshot / "README.md").write_text(CARD)
    value, said = ours(served, tmp_path / "data", tmp_path / "ours", *more)
    assert 0.3 < value < 0.7
    words = ["eval", "--model", "toy", "--api-url", served, "--api-key", "EMPTY", "--eval-type", "openai_api"]
    words += ["--datasets", "docvqa", "--dataset-args", json.dumps({"docvqa": {"local_path": str(snapshot)}})]
    words += ["--generation-config", json.dumps({"max_tokens": TOKENS, "temperature": 0}), "--eval-batch-size", "4"]
    words += ["--work-dir", str(tmp_path / "out"), "--no-timestamp"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [EVALSCOPE, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    found = list((tmp_path / "out" / "reports").rglob("docvqa.json"))
    assert found, done.stderr[-6000:] + done.stdout[-2000:]
    (predictions,) = (tmp_path / "out" / "predictions").rglob("docvqa*.jsonl")
    texts = [json.loads(line) for line in predictions.read_text().splitlines()]
    their_said = {str(one["metadata"]["questionId"]): _said(one) for one in texts}
    assert their_said == said
    scores = {one["score"] for one in read_object(found[0])["metrics"] if "anls" in json.dumps(one["identity"])}
    assert list(scores) == [pytest.approx(value, abs=1e-4)]


def _said(prediction: dict) -> str:
    """The text of an answer that EvalScope has kept."""
    return prediction["model_output"]["choices"][0]["message"]["content"].strip()


def test_short_answers_of_ocrbench_v2_score_as_its_authors_code_scores_them():
    path = ENVIRONMENT / "lmms_eval" / "tasks" / "ocrbench_v2" / "vqa_metric.py"
    spec = importlib.util.spec_from_file_location("vqa_metric", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    kinds = [
        ("diagram QA en", "", theirs.vqa_evaluation),
        ("diagram QA en", "case sensitive", theirs.vqa_evaluation_case_sensitive),
        ("cognition VQA cn", "", theirs.cn_vqa_evaluation),
        ("formula recognition en", "", theirs.math_expression_evaluation),
    ]
    draw = random.Random(0)
    words = "the cat sat on a mat 12 $4.50 Total, \u5317\u4eac \u5e02 due 7 x".split()

    def text(most):
        return draw.choice(" \n").join(draw.choice(words) for _ in range(draw.randint(1, most)))

    partly = 0
    for _ in range(500):
        golds = [text(7) for _ in range(draw.randint(1, 3))]
        said = text(9) if draw.random() < 0.5 else f"{golds[0].replace('a', 'b', 1)} {text(2)}"
        for kind, method, score in kinds:
            value = ocrbench_v2.score(said, kind, {"eval": method}, golds).value
            assert value == pytest.approx(score(said, list(golds)))
            partly += 0 < value < 1
        number, said = draw.randint(1, 30), f"{draw.choice(['about', 'there are'])} {draw.randint(0, 60)} or 3"
        value = ocrbench_v2.score(said, "text counting en", {"eval": "regression"}, [number]).value
        assert value == pytest.approx(theirs.counting_evaluation(said, [number], "regression"))
    assert partly > 50
