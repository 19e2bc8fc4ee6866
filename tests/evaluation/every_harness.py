"""The scores of lmms-eval beside those of jvlm evaluate, in an environment of its own: `make test-harnesses`.

The model is small and random, so right answers are made from what it says: the same, nearly the same, another.
"""

from __future__ import annotations

import base64
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
import pytest
from PIL import Image

from jvlm import cli
from jvlm.evaluation.store import AnswerStore
from jvlm.json_files import read_object
from jvlm.scoring.benchmarks import ocrbench_v2
from tests.evaluation.benchmarks import parquet, picture, png
from tests.support import ROOT

ENVIRONMENT = ROOT / ".venv" / "harness-lmms-eval"
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


def rows(answers: list[str]) -> list[dict]:
    said = [text.strip() for text in answers]
    golds = [(text, f"{text[:-2]}qz", "something else entirely")[n % 3] for n, text in enumerate(said)]
    return [
        {"questionId": str(n), "question": f"what is the number {n}?", "docId": n, "image": picture(n)}
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


def ours(model: str, data: Path, output: Path) -> tuple[float, dict[str, str]]:
    """The score of jvlm evaluate, and the answers by question."""
    words = ["evaluate", "--model", model, "--tasks", "docvqa_val", "--data", str(data), "--output", str(output)]
    assert cli.main([*words, "--max_new_tokens", str(TOKENS)]) == 0
    replies = AnswerStore(output / "docvqa_val").read()
    assert not any(one.error for one in replies.values())
    return read_object(output / "docvqa_val" / "score.json")["value"], {
        name: r.text for (name, _), r in replies.items()
    }


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


def test_a_request_as_vlmevalkit_makes_it_is_answered(served):
    """The body of its wrapper for --base-url, whose package is not on PyPI."""
    image = Image.open(io.BytesIO(png()))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    picture = {"url": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "what is it?"}]
    sampling = {"n": 1, "max_tokens": TOKENS, "temperature": 0.0, "top_k": 1, "top_p": 1.0, "repetition_penalty": 1.0}
    body = {"model": "toy", "messages": [{"role": "user", "content": content}], **sampling}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer EMPTY"}
    answer = httpx2.post(f"{served}/chat/completions", content=json.dumps(body), headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["choices"][0]["message"]["content"].strip(), str)


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
