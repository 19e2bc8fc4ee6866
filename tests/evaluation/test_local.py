"""A model on this machine behind the same protocol as a server's."""

from __future__ import annotations

import pytest

from jvlm.data.examples import parse_example
from jvlm.evaluation import registry
from jvlm.evaluation.clients import LocalClient, Prompt
from jvlm.evaluation.run import Settings, evaluate
from jvlm.evaluation.task import Decoding
from jvlm.inference.generate import generate
from jvlm.training import starting_model
from tests.evaluation import benchmarks
from tests.training import support

# what the fast tier has of it is in tests/test_job.py: questions of examples are asked through the same client
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return starting_model.start_model(support.experiment(folder, support.write_examples(folder, 1)))


def test_a_local_model_answers_as_generate_does_and_is_scored(model, tmp_path):
    benchmarks.docvqa(tmp_path)
    benchmarks.screenspot(tmp_path)
    client = LocalClient(*model, batch_size=2, name="tiny")
    tasks = registry.choose(["docvqa_val,screenspot"], registry.tasks())
    settings = Settings(limit=3, decoding={"max_new_tokens": 4})
    records = evaluate(client, tasks, tmp_path, tmp_path / "out", settings)
    assert [(r["answers"], r["failed"], r["truncated"] <= 3) for r in records] == [(3, 0, True)] * 2
    assert records[0]["prompt_tokens"] > 3
    described = records[0]["settings"]["client"]
    assert (described["kind"], described["model"], len(described["weights"])) == ("local", "tiny", 16)
    picture = {"messages": [{"role": "user", "content": "<image>what?"}], "images": [benchmarks.png()]}
    conversations = [parse_example(picture), parse_example({"messages": [{"role": "user", "content": "why?"}]})]
    (one, other) = sorted(
        client.replies([Prompt(str(n), c, n) for n, c in enumerate(conversations)], Decoding(max_new_tokens=4)),
        key=lambda reply: reply.id,
    )
    assert [one.text, other.text] == generate(*model, conversations, max_new_tokens=4, batch_size=2)
    assert one.sizes[0].original == (56, 28)


def test_an_example_without_its_image_fails_by_itself(model):
    gone = parse_example({"messages": [{"role": "user", "content": "<image>what?"}], "images": ["gone.png"]})
    (reply,) = LocalClient(*model).replies([Prompt("x", gone)], Decoding(max_new_tokens=2))
    assert reply.finish == "error"
    assert "file not found" in reply.error
    assert reply.cause is not None
