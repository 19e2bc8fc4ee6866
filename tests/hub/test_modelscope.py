"""What is handed to ModelScope's client, which is an extra: here a stand-in takes its place."""

import sys
import types
from pathlib import Path

import pytest

from jvlm import hub
from jvlm.errors import UserError
from jvlm.hub import modelscope


class _Client:
    def __init__(self, folder: Path):
        self.folder, self.calls, self.sent = folder, [], {}
        self.HubApi = lambda token: self

    def snapshot_download(self, repo, **settings):
        self.calls.append((repo, settings))
        return str(self.folder)

    def create_repo(self, repo, **settings):
        self.calls.append((repo, settings))

    def upload_folder(self, folder_path, **settings):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        self.sent = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def client(monkeypatch, tmp_path):
    found = _Client(tmp_path)
    monkeypatch.setattr(modelscope, "_client", lambda id: found)
    return found


def test_a_model_is_asked_for_with_its_revision_and_the_files_that_are_read(client, tmp_path):
    assert hub.download("modelscope://org/model@v1") == tmp_path
    ((repo, settings),) = client.calls
    assert (repo, settings["revision"]) == ("org/model", "v1")
    assert "*.safetensors" in settings["allow_patterns"]
    assert "*.bin" not in settings["allow_patterns"]


def test_the_files_that_the_hub_would_get_are_sent_and_no_others(client, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, content in {"config.json": b"{}", "model.safetensors": b"w" * 9, "optimizer.pt": b"no"}.items():
        (folder / name).write_bytes(content)
    hub.upload(folder, "modelscope://me/model", private=True)
    assert client.calls == [("me/model", {"repo_type": "model", "visibility": "private", "exist_ok": True})]
    assert client.sent.keys() == {"README.md", "config.json", "model.safetensors"}
    assert client.sent["model.safetensors"] == b"w" * 9
    assert not (folder / "README.md").exists()


def test_without_the_client_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", types.ModuleType("modelscope"))
    with pytest.raises(UserError, match=r"pip install 'jvlm\[modelscope\]'"):
        hub.download("modelscope://org/model")
