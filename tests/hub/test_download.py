"""Downloads through the real client of the Hub, from a server on this machine that also fails."""

import hashlib
import shutil
from pathlib import Path

import huggingface_hub.constants as constants
import numpy as np
import pytest

import jvlm
from jvlm import hub as jvlm_hub
from jvlm.errors import UserError
from jvlm.hub import downloads
from jvlm.hub.downloads import resolve
from jvlm.hub.errors import HubUnavailable
from jvlm.hub.ids import HubId
from tests.hub.server import TOKEN

WEIGHTS = np.random.default_rng(0).bytes(300_000)
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "config.json": b'{"model_type": "x"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ 1 }}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.safetensors": b"never",
    "onnx/model.onnx": b"never",
    "original/params.json": b"{}",
}
READ = {"README.md", "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


def forget():
    """As another process would see it."""
    downloads._commits.clear()
    downloads._folders.clear()
    downloads._unreachable.clear()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_model_arrives_byte_for_byte_with_the_files_that_are_read_and_no_others(hub):
    hub.add("org/model", FILES)
    folder = jvlm_hub.download("org/model")
    assert files_of(folder) == {name: FILES[name] for name in READ}
    hub.requests.clear()
    forget()
    assert jvlm_hub.download("org/model") == folder
    assert not [path for _, path, _ in hub.requests if "/resolve/" in path or "/blobs/" in path]


def test_only_the_shards_that_the_index_names_are_fetched(hub):
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    shards = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 50 for n in (1, 2)}
    files = {"config.json": b"{}", "model.safetensors.index.json": index, **shards}
    hub.add("org/model", {**files, "other.safetensors": b"never"})
    assert files_of(jvlm_hub.download("org/model")) == files


def test_without_weights_only_small_files_are_fetched(hub):
    hub.add("org/model", FILES)
    assert set(files_of(jvlm_hub.download("org/model", weights=False))) == READ - {"model.safetensors"}


def test_a_revision_is_pinned_to_its_commit(hub):
    repo = hub.add("org/model", FILES)
    first = repo.refs["main"]
    repo.commit({"config.json": b'{"new": 1}'}, "dev")
    second = repo.commit({"config.json": b'{"new": 2}'})
    assert resolve(HubId("org/model")).revision == second
    assert (jvlm_hub.download(f"org/model@{first}") / "config.json").read_bytes() == FILES["config.json"]
    assert (jvlm_hub.download("org/model@dev") / "config.json").read_bytes() == b'{"new": 1}'
    assert (jvlm_hub.download("org/model", revision="main") / "config.json").read_bytes() == b'{"new": 2}'


def test_a_folder_is_taken_as_it_is_and_nothing_asked(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/model").mkdir(parents=True)
    assert jvlm_hub.download("org/model") == Path("org/model")
    assert not hub.requests


def test_a_model_is_loaded_by_its_id(hub, tiny, tmp_path):
    hub.add("org/tiny", {p.name: p.read_bytes() for p in tiny.folder.iterdir() if p.is_file()})
    model, _ = jvlm.load("org/tiny")
    there, _ = jvlm.load(tiny.folder)
    for path, value in jvlm_parameters(there).items():
        np.testing.assert_array_equal(jvlm_parameters(model)[path], value)


def jvlm_parameters(model):
    from jvlm.models import vlm

    return {path: np.asarray(v.get_value()) for path, v in vlm.parameters(model).items()}


@pytest.mark.parametrize("place", ["runs/nothing/best", "nothing", "./org/model"])
def test_what_is_neither_folder_nor_id_is_refused_and_both_are_said(hub, place):
    with pytest.raises(UserError, match=r"not a folder here, and not the id"):
        jvlm_hub.download(place)
    assert not hub.requests


def test_a_repository_that_is_not_there_has_its_nearest_named(hub):
    hub.add("org/Model-7B", FILES)
    with pytest.raises(UserError, match=r"org/Modell-7B is not a folder here, and .* did you mean org/Model-7B\?"):
        jvlm_hub.download("org/Modell-7B")


def test_a_revision_that_is_not_there_has_the_others_named(hub):
    hub.add("org/model", FILES).commit({}, "v2")
    with pytest.raises(UserError, match=r"no revision 'v3'; it has main, v2"):
        jvlm_hub.download("org/model@v3")


def test_a_repository_without_safetensors_is_refused(hub):
    hub.add("org/model", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(UserError, match=r"no \*.safetensors, and pytorch_model.bin is not read"):
        jvlm_hub.download("org/model")


def test_a_repository_of_something_else_is_refused(hub):
    hub.add("org/data", {"train.jsonl": b"{}"})
    with pytest.raises(UserError, match="holds no model"):
        jvlm_hub.download("org/data")


def test_a_gated_repository_asks_for_a_login(hub):
    hub.add("org/model", FILES, gated=True)
    with pytest.raises(UserError, match=r"is gated: ask for access at .*/org/model, then log in"):
        jvlm_hub.download("org/model")


@pytest.mark.parametrize("gated", [False, True], ids=["private", "gated"])
def test_the_token_of_the_hub_s_own_store_opens_a_repository(logged_in, gated, capsys):
    logged_in.add("org/model", FILES, private=not gated, gated=gated)
    assert (jvlm_hub.download("org/model") / "model.safetensors").read_bytes() == WEIGHTS
    assert all(had == ("/blobs/" not in path) for _, path, had in logged_in.requests)  # not to the host of the content
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_private_repository_looks_as_if_it_were_not_there(hub):
    hub.add("org/model", FILES, private=True)
    with pytest.raises(UserError, match="if it is private, log in"):
        jvlm_hub.download("org/model")


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_in_trouble_is_asked_again(hub, status):
    hub.add("org/model", FILES)
    hub.fail = {("GET", "/api/models/org/model$"): [status], ("HEAD", "/resolve/"): [status]}
    assert (jvlm_hub.download("org/model") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_download_that_is_cut_is_completed(hub):
    hub.add("org/model", FILES)
    hub.fail = {("GET", "/blobs/"): ["cut"]}
    assert (jvlm_hub.download("org/model") / "model.safetensors").read_bytes() == WEIGHTS


def test_bytes_that_are_not_the_hub_s_are_removed_and_the_next_attempt_is_whole(hub):
    hub.add("org/model", FILES)
    hub.fail = {("GET", "/blobs/"): ["corrupt"]}
    with pytest.raises(HubUnavailable, match=r"model.safetensors did not arrive as"):
        jvlm_hub.download("org/model")
    folder = jvlm_hub.download("org/model")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() == hashlib.sha256(WEIGHTS).digest()


def test_a_server_that_stays_down_is_an_outage_and_no_mistake(hub):
    hub.add("org/model", FILES)
    hub.fail = {("GET", "/api/models/org/model$"): [503] * 10}
    with pytest.raises(HubUnavailable, match=r"is not a folder here, and .* cannot give it \(status 503\)"):
        jvlm_hub.download("org/model")


def test_without_a_network_the_cache_is_used_and_it_is_said(hub, monkeypatch, capsys):
    hub.add("org/model", FILES)
    folder = jvlm_hub.download("org/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    forget()
    assert jvlm_hub.download("org/model") == folder
    assert "is taken from the cache" in capsys.readouterr().out
    with pytest.raises(HubUnavailable, match="Check the network"):
        jvlm_hub.download("org/other")


def test_offline_nothing_is_asked(hub, monkeypatch):
    hub.add("org/model", FILES)
    folder = jvlm_hub.download("org/model")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert jvlm_hub.download("org/model") == folder == jvlm_hub.download(f"org/model@{folder.name}")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, and .* does not have it"):
        jvlm_hub.download("org/other")
    assert not hub.requests


def test_too_little_space_is_said_before_anything_is_fetched(hub, monkeypatch):
    hub.add("org/model", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(UserError, match=r"GiB more to download, but .* has 0.00 GiB free"):
        jvlm_hub.download("org/model")
    assert not [path for _, path, _ in hub.requests if "/blobs/" in path]


def test_a_commit_that_is_in_the_cache_needs_no_network(hub):
    hub.add("org/model", FILES)
    folder = jvlm_hub.download("org/model")
    hub.requests.clear()
    forget()
    assert jvlm_hub.download(f"hf://org/model@{folder.name}") == folder
    assert not hub.requests
