"""While data does not come, the log says what is waited for."""

import json
import re
import time

from jvlm.data import pipeline, waiting
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode
from jvlm.data.waiting import Waiting


def test_what_takes_long_is_said_again_and_again(capfd):
    said = ""
    with Waiting(lambda thing: f"example {thing}", seconds=0.1) as watch:
        watch.now(0)
        watch.now(1)
        for _ in range(600):  # of a minute, on a machine however busy
            said += capfd.readouterr().out
            if said.count("example 1\n") >= 2:
                break
            time.sleep(0.1)
    assert all(re.fullmatch(r"waiting for data for \d+ s: example 1", line) for line in said.splitlines())
    assert said.count("example 1\n") >= 2


def test_what_comes_in_time_is_not_said(capfd):
    with Waiting(str) as watch:
        for thing in range(100):
            watch.now(thing)
    assert not capfd.readouterr().out


def test_the_file_and_line_of_an_example_that_does_not_come_are_in_the_log(tmp_path, monkeypatch, capfd, tiny):
    path = tmp_path / "examples.jsonl"
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 6)
    config = DataConfig(train=(str(path),), batch_size=1, seq_len=128, max_patches=0, shuffle="none", curves="off")
    monkeypatch.setattr(waiting, "SECONDS", 0.1)
    read = Encode.read

    def slow(self, element, rng):
        if element[0].number == 4:
            time.sleep(0.6)
        return read(self, element, rng)

    monkeypatch.setattr(Encode, "read", slow)
    dataset, _ = pipeline.training_data(tiny.processor, config, seed=0, epochs=1)
    assert sum(batch.conversations for batch in dataset) == 6
    assert f"s: {path}, line 4" in capfd.readouterr().out
