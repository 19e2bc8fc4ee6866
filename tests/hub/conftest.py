"""The local hub, and a client of it that has nothing of the machine's: neither cache, nor token, nor network."""

import huggingface_hub.constants as constants
import pytest

from tests.hub.server import TOKEN, HubServer


@pytest.fixture(scope="session")
def running():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(running, monkeypatch, tmp_path):
    """An empty hub, whose client has an empty cache and no token."""
    running.repos.clear(), running.blobs.clear(), running.requests.clear(), running.fail.clear()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("jvlm.hub.errors._SECONDS", 0.01)
    return running


@pytest.fixture
def logged_in(hub, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    return hub
