"""Uploads through the real client of the Hub: what arrives, what never leaves, and what failures do."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from jvlm import hub as jvlm_hub
from jvlm.errors import UserError
from jvlm.hub import card
from jvlm.hub.card import Card
from jvlm.hub.errors import HubUnavailable
from tests.hub.server import TOKEN

WEIGHTS = np.random.default_rng(1).bytes(200_000)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"/home/user/": 0}}}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "experiment.json").write_text(json.dumps({"data": str(tmp_path / "rows.jsonl")}))
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return folder


def front(text: bytes) -> dict:
    return yaml.safe_load(text.decode().split("---")[1])


def now(hub, id="me/model"):
    repo = hub.repos["models", id]
    return repo.commits[repo.refs["main"]]


def test_what_is_sent_comes_back_byte_for_byte(logged_in, model):
    report = jvlm_hub.upload(model, "me/model", private=True)
    assert logged_in.repos["models", "me/model"].private
    assert "model.safetensors" in logged_in.repos["models", "me/model"].lfs
    assert set(now(logged_in)) == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert report.left_out == ("experiment.json", "optimizer.pt")
    assert dict(report.files) == {path: len(content) for path, content in now(logged_in).items()}
    again = jvlm_hub.download("me/model")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (model / name).read_bytes()


def test_a_second_upload_sends_no_weights_that_are_there(logged_in, model):
    jvlm_hub.upload(model, "me/model")
    logged_in.requests.clear()
    jvlm_hub.upload(model, "me/model")
    assert not [path for method, path, _ in logged_in.requests if method == "PUT"]
    assert len(logged_in.repos["models", "me/model"].commits) == 3  # the empty one of a new repository, and two


def test_a_dry_run_lists_files_with_sizes_and_asks_nothing(hub, model):
    report = jvlm_hub.upload(model, "me/model", dry_run=True)
    assert ("model.safetensors", len(WEIGHTS)) in report.files
    assert "200,000  model.safetensors" in report.text()
    assert "not sent (2): experiment.json, optimizer.pt" in report.text()
    assert not hub.requests
    assert not (model / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.json", '{"_name_or_path": "/data/models/base"}', "the absolute path"),
        ("generation_config.json", '{"a": 1,\n"key": "' + TOKEN + '"}', "line 2: a token of the Hugging Face Hub"),
        ("README.md", "Trained in /home/someone/runs on rows", "the absolute path /home/someone/runs"),
        ("chat_template.jinja", "{# C:\\Users\\someone #}", "the absolute path"),
        ("notes.txt", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("tokenizer.json", '{"x": "sk-' + "a" * 40 + '"}', "an API key"),
    ],
)
def test_a_secret_or_a_path_of_this_disk_stops_an_upload_and_names_the_file(logged_in, model, name, text, problem):
    (model / name).write_text(text)
    with pytest.raises(UserError) as refused:
        jvlm_hub.upload(model, "me/model")
    assert f"{name}, line" in str(refused.value)
    assert problem in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert not logged_in.requests


def test_text_that_only_looks_like_a_path_is_sent(logged_in, model):
    (model / "chat_template.jinja").write_text("{{ '</think>/no_think' }} https://host/home/x a/b/c")
    jvlm_hub.upload(model, "me/model")


@pytest.mark.parametrize("failures", [{("PUT", "/lfs/"): [500]}, {("POST", "/commit/"): [503, 503]}], ids=str)
def test_what_fails_is_tried_again(logged_in, model, failures, capsys):
    logged_in.fail = failures
    jvlm_hub.upload(model, "me/model")
    assert now(logged_in)["model.safetensors"] == WEIGHTS
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_hub_that_stays_down_is_an_outage(logged_in, model):
    logged_in.fail = {("POST", "/commit/"): [503] * 20}
    with pytest.raises(HubUnavailable, match=r"me/model was not sent to .* \(status 503\)"):
        jvlm_hub.upload(model, "me/model")


def test_without_a_login_it_is_said_how_to(hub, model):
    with pytest.raises(UserError, match="hf auth login"):
        jvlm_hub.upload(model, "me/model")


def test_no_permission_is_the_user_s_to_mend(logged_in, model):
    logged_in.fail = {("POST", "/api/repos/create"): [403]}
    with pytest.raises(UserError, match=r"status 403"):
        jvlm_hub.upload(model, "me/model")


def test_an_adapter_names_the_id_of_its_base_and_never_a_folder(logged_in, adapter):
    before = (adapter / "adapter_config.json").read_text()
    with pytest.raises(UserError, match=r"adapter_config.json, line 1: the absolute path"):
        jvlm_hub.upload(adapter, "me/lora")
    jvlm_hub.upload(adapter, "me/lora", base_model="org/base")
    sent = now(logged_in, "me/lora")
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert (adapter / "adapter_config.json").read_text() == before
    values = front(sent["README.md"])
    # as PEFT writes its cards (tests/golden/README.md, model_card_by_peft.md), and more
    assert values["base_model"] == "org/base"
    assert values["library_name"] == "peft"
    assert {"base_model:adapter:org/base", "lora", "transformers"} <= set(values["tags"])
    assert values["base_model_relation"] == "adapter"
    assert values["pipeline_tag"] == "image-text-to-text"


def test_a_base_in_the_cache_of_the_hub_has_its_id(logged_in, adapter, tmp_path):
    base = tmp_path / f"cache/models--org--base/snapshots/{'0a' * 20}"
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    jvlm_hub.upload(adapter, "me/lora")
    assert json.loads(now(logged_in, "me/lora")["adapter_config.json"])["base_model_name_or_path"] == "org/base"


def test_a_card_holds_scores_data_and_license_as_the_hub_s_own_reader_finds_them():
    from huggingface_hub import ModelCard

    facts = Card("org/base", "finetune", "apache-2.0", ("org/set",), ("docs",), {"accuracy": 0.93}, "org/set test")
    data = ModelCard(facts.text("me/model")).data
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "org/base", ["org/set"])
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.93, "org/set")


def test_the_license_of_a_base_is_that_of_its_card(tmp_path):
    assert card.license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# x\n")
    assert card.license_of(tmp_path) == "apache-2.0"


def test_a_process_of_its_own_with_the_environment_s_variables(logged_in, model, tmp_path):
    """The variables that users set are read when the client is imported."""
    program = "import sys; from jvlm import hub; hub.upload(sys.argv[1], 'me/model'); print(hub.download('me/model'))"
    known = {"HF_ENDPOINT": logged_in.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in offline}
    environment |= {**known, "HF_TOKEN": TOKEN, "HF_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(model)], env=environment, capture_output=True, text=True, check=True
    )
    again = done.stdout.splitlines()[-1]
    assert again.startswith(str(tmp_path / "home/hub/models--me--model/snapshots/"))
    assert TOKEN not in done.stdout + done.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != tmp_path / "token"]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
