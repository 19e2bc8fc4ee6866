"""One processor and one tokenizer for all tests of the server."""

import pytest

from tests.server.scripted import ScriptedEngine, Served, processor_of


@pytest.fixture(scope="session")
def processor(tmp_path_factory, tokenizer_folder):
    """The processor of a small Qwen2.5-VL."""
    return processor_of(tmp_path_factory.mktemp("served"), tokenizer_folder)


@pytest.fixture
def serve(processor):
    """Start a server that answers with the texts given; its settings are those of `ServerSettings`."""
    started = []

    def start(*texts, **settings):
        served = Served(ScriptedEngine(processor, *(texts or ("the answer is two.",))), processor, **settings)
        started.append(served)
        return served.__enter__()

    yield start
    for served in started:
        served.__exit__()
