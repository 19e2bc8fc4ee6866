"""Asking and scoring tasks: files of the true forms, crashes, failures, scoring again, comparison, a server."""

from __future__ import annotations

import http.server
import json
import re
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from jvlm import cli
from jvlm.cli import evaluate as evaluate_command
from jvlm.errors import UserError
from jvlm.evaluation import registry
from jvlm.evaluation.clients import Boxes, EndpointClient
from jvlm.evaluation.comparison import compare_folders
from jvlm.evaluation.endpoint import Endpoint
from jvlm.evaluation.metrics import METRICS
from jvlm.evaluation.run import Settings, evaluate, score_task
from jvlm.evaluation.store import AnswerStore
from jvlm.json_files import read_object
from jvlm.options import parse
from tests.evaluation import benchmarks
from tests.evaluation.benchmarks import Scripted

TASKS = registry.tasks()
THREE = registry.choose(["docvqa_val,mmmu_val,screenspot"], TASKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    benchmarks.docvqa(folder)
    benchmarks.mmmu(folder)
    benchmarks.screenspot(folder)
    return folder


def _right(text: str) -> str:
    if number := re.search(r"number (\d+)\?", text):
        return f"number {number[1]}"
    if "match the command" in text:
        return '[{"bbox_2d": [30, 2, 50, 10], "label": "press"}]'
    return "B" if "form" in text else "A"


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_right_answers_score_all_in_every_form_of_files(data, tmp_path):
    client = Scripted(_right)
    records = {record["task"]: record for record in evaluate(client, THREE, data, tmp_path)}
    assert {name: (record["value"], record["questions"]) for name, record in records.items()} == {
        "docvqa_val": (1.0, 6),
        "mmmu_val": (1.0, 2),
        "screenspot": (1.0, 3),
    }
    assert "<image>What is the number 3?\nAnswer the question using a single word or phrase." in client.asked
    assert "<image>Which colour?\nA. red\nB. blue\nC. green" in "\n".join(client.asked)
    assert not any("left out" in text for text in client.asked), "rows of another split were asked"
    assert records["screenspot"]["categories"]["data_type"]["icon"]["value"] == 1
    record = records["docvqa_val"]
    assert record["interval"][0] < 1
    assert record["judge"].startswith("none: published scores are judged")
    assert all(record[name] for name in ("version", "prompt_hash", "code", "jvlm", "settings", "completion_tokens"))


def test_a_crash_loses_no_answer_and_the_run_goes_on_where_it_stopped(data, tmp_path):
    calls = iter(range(100))
    crashing = Scripted(lambda text: RuntimeError("killed") if next(calls) == 3 else _right(text))
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(crashing, THREE[:1], data, tmp_path)
    folder = tmp_path / "docvqa_val"
    assert len(_lines(folder)) == 3
    with open(folder / "answers.jsonl", "a") as file:
        file.write('{"item": {"id": "cut')
    again = Scripted(_right)
    (record,) = evaluate(again, THREE[:1], data, tmp_path)
    assert (len(again.asked), record["value"], record["questions"]) == (3, 1.0, 6)
    assert not set(again.asked) & set(crashing.asked[:3])


def test_failed_cut_and_unread_answers_stand_beside_the_mean(data, tmp_path):
    answers = {"0": None, "1": "<think>never ends", "2": "nothing like it", "3": "[LMMS_EVAL_REQUEST_FAILED after 5]"}
    client = Scripted(lambda text: answers.get(re.search(r"number (\d)\?", text)[1], _right(text)), finish="length")
    (record,) = evaluate(client, THREE[:1], data, tmp_path)
    assert (record["answers"], record["scored"], record["failed"]) == (6, 4, 2)
    assert record["value"] == 0.5, "failed requests are no wrong answers"
    assert record["truncated"] == 4
    assert record["reasons"]["truncated"] == 1
    healed = Scripted(_right)
    (record,) = evaluate(healed, THREE[:1], data, tmp_path)
    assert len(healed.asked) == 2, "only failed requests are made again"
    assert (record["failed"], record["scored"]) == (0, 6)


def test_other_settings_may_not_go_on_with_the_same_answers(data, tmp_path):
    evaluate(Scripted(_right), THREE[:1], data, tmp_path)
    with pytest.raises(UserError, match=r"other settings.*'scripted' -> 'other'"):
        evaluate(Scripted(_right, name="other"), THREE[:1], data, tmp_path)
    with pytest.raises(UserError, match=r"other settings.*style"):
        evaluate(Scripted(_right), THREE[:1], data, tmp_path, Settings(style="boxed"))


def test_a_larger_limit_adds_to_the_questions_of_a_smaller_one(data, tmp_path):
    first, second = Scripted(_right), Scripted(_right)
    evaluate(first, THREE[:1], data, tmp_path, Settings(limit=2))
    (record,) = evaluate(second, THREE[:1], data, tmp_path, Settings(limit=5))
    assert (len(first.asked), len(second.asked), record["questions"]) == (2, 3, 5)


def test_a_part_of_a_task_is_said_to_be_one_also_when_it_is_scored_again(data, tmp_path, capsys):
    said = []
    for limit in (5, 6):
        (record,) = evaluate(Scripted(_right), THREE[:1], data, tmp_path, Settings(limit=limit))
        assert cli.main(["evaluate", "--rescore", "--output", str(tmp_path)]) == 0
        said.append(("a random part of the task (--limit 5)" in capsys.readouterr().out, record["limit"]))
    assert said == [(True, 5), (False, None)], "six are all of its questions"


def test_failures_are_told_with_the_first_reason_and_what_to_do(data, tmp_path, capsys):
    evaluate(Scripted(lambda text: None if "number 2?" in text else _right(text)), THREE[:1], data, tmp_path)
    assert cli.main(["evaluate", "--rescore", "--output", str(tmp_path)]) == 0
    said = "failed, to be asked again by the same command; the first: question 2: 503 from the server"
    assert said in capsys.readouterr().out


def test_answers_that_cannot_be_scored_again_are_named(data, tmp_path):
    evaluate(Scripted(_right), THREE[:1], data, tmp_path)
    with pytest.raises(UserError, match=r"holds no answers to mmmu_val; ask a model first"):
        cli_rescore(tmp_path, "--tasks", "mmmu_val")
    (tmp_path / "docvqa_val").rename(tmp_path / "receipts")
    with pytest.raises(UserError, match=r"holds answers to receipts, which are no tasks here; give their file with"):
        cli_rescore(tmp_path)


def cli_rescore(folder: Path, *more: str) -> None:
    evaluate_command.run(["--rescore", "--output", str(folder), *more])


def test_boxed_answers_and_demonstrations(data, tmp_path):
    client = Scripted(lambda text: f"It is \\boxed{{{_right(text)}}}, I think.")
    settings = Settings(style="boxed", shots=2, runs=3)
    (record,) = evaluate(client, THREE[:1], data, tmp_path, settings)
    assert (record["value"], record["answers"], record["questions"]) == (1.0, 18, 6)
    assert client.asked[0].endswith("Put your final answer in \\boxed{}.")


def test_scores_are_made_again_without_model_and_data(data, tmp_path, capsys):
    evaluate(Scripted(_right), THREE[:1], data, tmp_path)
    before = read_object(tmp_path / "docvqa_val" / "score.json")
    lines = _lines(tmp_path / "docvqa_val")
    lines[0]["text"] = "wrong"
    (tmp_path / "docvqa_val" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["evaluate", "--rescore", "--output", str(tmp_path)]) == 0
    after = read_object(tmp_path / "docvqa_val" / "score.json")
    assert (before["value"], after["value"]) == (1.0, pytest.approx(5 / 6))
    assert "docvqa_val                    83.3" in capsys.readouterr().out


def test_two_runs_are_compared_question_by_question(data, tmp_path, capsys):
    evaluate(Scripted(_right), THREE[:1], data, tmp_path / "a")
    evaluate(Scripted(lambda text: "no" if "number 2?" in text else _right(text)), THREE[:1], data, tmp_path / "b")
    (one,) = compare_folders(tmp_path / "a", tmp_path / "b")
    assert (one.questions, one.left_out, one.differing) == (6, 0, ())
    assert one.comparison.difference.value == pytest.approx(-1 / 6)
    assert one.comparison.detectable > 0.3
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "docvqa_val                   100.0    83.3" in capsys.readouterr().out


WRONG = {
    "--tasks docvqa_vall": "no task 'docvqa_vall'; did you mean docvqa_val",
    "--data {empty}": r"(?s)none of its files.*lmms-lab/DocVQA.*DocVQA_VAL\.tsv",
    "--data {empty}/gone": "gone is no folder",
    "--include {empty}/mine.py": "no such file; give a Python file",
    "--output {data}/MMMU_DEV_VAL.tsv": "MMMU_DEV_VAL.tsv cannot be written",
    "--output {before}": "answers made with other settings: decoding.max_new_tokens: 32 -> 7",
    "--training {empty}/*.jsonl": "jsonl",
    "--judge nowhere --judge_model judge": "no address of a server",
    "--judge http://127.0.0.1:9/v1": "Its model can be named with --judge_model",
    "--limit 0": "--limit is 0; it must be at least 1",
    "--batch_size 0": "--batch_size is 0; it must be at least 1",
    "--timeout 0": "--timeout is 0.0; it must be a positive number of seconds",
    "--temperature -1": "--temperature is -1.0; it must be 0",
    "--top_p 2": "--top_p is 2.0; it must be above 0 and at most 1",
    "--box_space norm1": "--box_space is for a server, and --model is MODEL; leave it out",
    "--adapters a=A --adapter b": "--adapter b: none of --adapters has that name",
    "--model http://127.0.0.1:9/v1 --adapters a=A": "--adapters is for a model on this machine",
    "--model http://127.0.0.1:9/v1 --max_pixels 9": "limits of images are for a model on this machine",
}


@pytest.mark.parametrize("typed", WRONG)
def test_what_is_wrong_is_told_before_a_model_is_loaded(typed, data, tmp_path, monkeypatch):
    def load(chosen):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluate_command, "load", load)
    settings = Settings(decoding={"max_new_tokens": 32})
    evaluate(Scripted(_right), THREE[:1], data, tmp_path / "before", settings)
    (tmp_path / "empty").mkdir()
    typed_words = typed.format(empty=tmp_path / "empty", data=data, before=tmp_path / "before").split()
    words = {"--model": "MODEL", "--tasks": "docvqa_val", "--data": str(data), "--output": str(tmp_path / "out")}
    words |= {"--max_new_tokens": "7"}
    words |= dict(zip(typed_words[::2], typed_words[1::2], strict=True))
    line = [word for pair in words.items() for word in pair]
    with pytest.raises(UserError, match=WRONG[typed]):
        evaluate_command.run(line)


def test_limits_of_images_are_checked_before_weights_are_read(tiny, data, tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("jvlm.weights.io.load", load)
    words = ["--model", str(tiny.folder), "--tasks", "docvqa_val", "--data", str(data), "--output", str(tmp_path)]
    with pytest.raises(UserError, match="--max_pixels: 0 is not a positive whole number"):
        evaluate_command.run([*words, "--max_pixels", "0"])


def test_a_command_with_nothing_wrong_in_it_loads_its_model(data, tmp_path, monkeypatch):
    class Loaded(Exception):
        """The model is asked for."""

    def load(chosen):
        raise Loaded

    monkeypatch.setattr(evaluate_command, "load", load)
    with pytest.raises(Loaded):
        evaluate_command.run(
            ["--model", "MODEL", "--tasks", "docvqa_val", "--data", str(data), "--output", str(tmp_path)]
        )


def test_unknown_tasks_and_own_tasks(tmp_path):
    with pytest.raises(UserError, match="did you mean docvqa_val"):
        registry.choose(["docvqa_vall"], TASKS)
    own = tmp_path / "mine.py"
    own.write_text(
        "from jvlm.evaluation.files import official\n"
        "from jvlm.evaluation.items import open_item\n"
        "from jvlm.evaluation.task import Task\n"
        "TASKS = [Task('mine', 'own', (official('mine.jsonl', media='pictures'),), open_item(), 'exact')]\n"
    )
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(benchmarks.png())
    (tmp_path / "mine.jsonl").write_text('{"question": "colour?", "answer": "red", "image": "a.png"}\n')
    known = registry.tasks([str(own)])
    (record,) = evaluate(Scripted(lambda text: "Red."), [known["mine"]], tmp_path, tmp_path / "out")
    assert (record["value"], record["group"]) == (1.0, "own")
    own.write_text(own.read_text().replace("'mine'", "'docvqa_val'", 1))
    with pytest.raises(UserError, match="there is a task docvqa_val already"):
        registry.tasks([str(own)])


def test_every_task_names_its_files_and_is_listed():
    listed = registry.listing(TASKS)
    for task in TASKS.values():
        assert task.name in listed
        assert task.files
        assert task.metric in METRICS


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers chats; the first two of every question fail."""

    failures: ClassVar[dict[str, int]] = {}
    seen: ClassVar[list[dict]] = []

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps(body["messages"])
        self.seen.append({**body, "authorization": self.headers.get("Authorization")})
        question = re.search(r"number \d\?", text)[0]
        self.failures[question] = self.failures.get(question, 0) + 1
        if "number 4?" in text:
            self._send(400, {"error": "too long"})
        elif self.failures[question] <= 2:
            self._send(503, {"error": "busy"})
        else:
            message = {"content": question[:-1], "reasoning_content": "hm"}
            choice = {"message": message, "finish_reason": "stop"}
            self._send(200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})

    def _send(self, status: int, values: dict) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    _Server.failures, _Server.seen = {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_server_is_asked_again_after_failures_and_refusals_are_no_answers(data, tmp_path, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    client = EndpointClient(Endpoint(server, "tiny", concurrency=4, pause=0.01))
    (record,) = evaluate(client, THREE[:1], data, tmp_path)
    assert (record["value"], record["scored"], record["failed"]) == (1.0, 5, 1)
    assert record["completion_tokens"] == 15
    assert len(_Server.seen) == 5 * 3 + 1, "a refused request is made once, others until they succeed"
    assert all(body["authorization"] == "Bearer sk-secret" for body in _Server.seen)
    kinds = {part["type"] for part in _Server.seen[0]["messages"][0]["content"]}
    assert kinds == {"image_url", "text"}
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    assert "sk-secret" not in written
    stored = AnswerStore(tmp_path / "docvqa_val").read()
    assert any("refused the request: 400" in one.error for one in stored.values())


def test_the_command_asks_a_server_whose_only_model_it_finds(data, tmp_path, server, capsys):
    _Server.failures = {f"number {n}?": 2 for n in range(6)}
    words = ["evaluate", "--model", server, "--tasks", "docvqa_val", "--data", str(data), "--output", str(tmp_path)]
    assert cli.main([*words, "--limit", "1", "--tries", "4"]) == 0
    assert "docvqa_val                   100.0" in capsys.readouterr().out
    with pytest.raises(UserError, match="no address of a server"):
        Endpoint("127.0.0.1:80", "tiny")


def test_sizes_of_boxes_are_declared_for_a_server_and_never_guessed():
    from PIL import Image

    image = Image.new("RGB", (640, 480))
    assert Boxes(space="norm1000").sizes(image).resized == (640, 480)
    assert Boxes().sizes(image).resized == (644, 476)


def test_scoring_needs_answers(tmp_path):
    with pytest.raises(UserError):
        score_task(THREE[0], tmp_path / "docvqa_val")


def test_the_command_loads_the_model_with_the_options_that_were_typed(monkeypatch):
    class Loaded(Exception):
        """The model is asked for."""

    def load(chosen):
        raise Loaded(chosen)

    monkeypatch.setattr(evaluate_command, "load", load)
    words = "--model DIR --adapters a=b --param_dtype bfloat16 --max_pixels 3211264".split()
    with pytest.raises(Loaded) as caught:
        evaluate_command.client(parse(evaluate_command.Evaluate, words, "jvlm evaluate"))
    (chosen,) = caught.value.args
    assert (chosen.model, chosen.adapters, chosen.param_dtype) == ("DIR", ("a=b",), "bfloat16")
    assert (chosen.images.max_pixels, chosen.quantization, chosen.parallel) == (3211264, None, None)
