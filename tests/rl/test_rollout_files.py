"""Rollouts on disk: read as they were written, whole or not there, and judged again to the same rewards."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import struct
import subprocess
import sys

import pytest

from jvlm.errors import UserError
from jvlm.rl import rollout_files
from jvlm.rl.records import AnswerRecord, GroupRecord
from jvlm.rl.rewards.config import rules
from jvlm.rl.rewards.source import RewardItem
from jvlm.rl.rewards.wire import blob_name
from jvlm.rl.rollout_files import RolloutWriter, StoredGroup, read_groups, read_summary

PICTURE = b"\x89PNG not really, and every byte counts \x00\xff"
ANSWERS = ("[10, 10, 50, 50]", "<think>left</think>[0, 0, 20, 20]", "none", "")
PROMPT = RewardItem(
    "a.jsonl, line 8",
    "boxes",
    "",
    gold=[[12, 10, 50, 50]],
    messages=({"role": "user", "content": "<image>wo? \u00e9 \ud83d"},),
    columns={"size": [100, 100]},
)


def float32(draw):
    """A number that float32 holds, of any size: what an engine gives."""
    return struct.unpack("f", struct.pack("f", -draw.random() * 10 ** draw.randint(-6, 1)))[0]


def group(serial):
    draw, answers = random.Random(serial), []
    for text in ANSWERS:
        count = draw.randint(1, 40)
        answers.append(
            AnswerRecord(
                tokens=tuple(draw.randrange(2**17) for _ in range(count)),
                log_probs=tuple(float32(draw) for _ in range(count)),
                entropies=tuple(-float32(draw) for _ in range(count)),
                versions=(serial // 10 - 1,) * count,
                text=text,
                finish="stop" if text else "length",
                reward=None if text == "none" else draw.random(),
                reason="ok",
                parsed=[[10.0, 10.0, 50.0, 50.0]],
                shaped=draw.gauss(0, 1),
                advantage=draw.gauss(0, 1),
            )
        )
    return GroupRecord(serial, 7, PROMPT.id, "boxes", 3, False, 20, tuple(answers), selected=True)


def stored(step, serial):
    return StoredGroup(step, group(serial), PROMPT, (blob_name(PICTURE),))


def write(folder, steps, last_step=0):
    writer = RolloutWriter(folder, last_step)
    for step in steps:
        for serial in range(10 * step, 10 * step + 3):
            writer.append(step, group(serial), PROMPT, [PICTURE])
        writer.finish_step(step, {"loss": 0.1 + step})
    return writer


def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path):
    write(tmp_path, (1, 2))
    assert list(read_groups(tmp_path)) == [stored(step, 10 * step + n) for step in (1, 2) for n in range(3)]
    assert list(read_groups(tmp_path, [2])) == [stored(2, 20 + n) for n in range(3)]
    assert read_summary(tmp_path, 2) == {"loss": 2.1}
    assert rollout_files.read_image(tmp_path, blob_name(PICTURE)) == PICTURE
    assert len(list((tmp_path / "images").iterdir())) == 1
    with gzip.open(rollout_files.path_of(tmp_path, 1), "rt", errors="surrogatepass") as file:  # other programs read it
        assert [json.loads(line).get("group", {}).get("serial") for line in file] == [10, 11, 12, None]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.rl.test_rollout_files import PICTURE, PROMPT, group, write
writer = write(Path(sys.argv[1]), (1,))
for serial in range(600):
    writer.append(2, group(serial), PROMPT, [PICTURE])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_whole_steps_and_a_restart_goes_on_to_equal_files(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], check=False)
    assert killed.returncode < 0
    assert [one.step for one in read_groups(tmp_path / "killed")] == [1, 1, 1]
    assert list((tmp_path / "killed").glob("*.part"))
    write(tmp_path / "killed", (2, 3), last_step=1)
    write(tmp_path / "unbroken", (1, 2, 3, 4))
    RolloutWriter(tmp_path / "unbroken", last_step=3)  # step 4 was not saved: it will be run again
    files = [{p.name: p.read_bytes() for p in sorted((tmp_path / n).glob("*.*"))} for n in ("killed", "unbroken")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_damage_and_what_is_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no rollouts"):
        list(read_groups(tmp_path))
    write(tmp_path, (1,))
    with pytest.raises(UserError, match="no step 5; it has 1"):
        list(read_groups(tmp_path, [5]))
    path = rollout_files.path_of(tmp_path, 1)
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[: len(whole) // 2], whole[:200] + b"\xff" * 9 + whole[209:], b"{}" + whole):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=path.name):
            list(read_groups(tmp_path))
    path.write_bytes(gzip.compress(b'{"step": 1, "group": {}, "prompt": {}}\n'))
    with pytest.raises(UserError, match="line 1 is not a group"):
        list(read_groups(tmp_path))
    path.write_bytes(whole)
    image = rollout_files.image_path(tmp_path, blob_name(PICTURE))
    image.write_bytes(b"other")
    with pytest.raises(UserError, match="another hash"):
        next(read_groups(tmp_path)).items(tmp_path)
    image.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        next(read_groups(tmp_path)).items(tmp_path)


def test_what_is_no_json_is_refused_in_a_gold_and_named_in_a_column(tmp_path):
    writer = RolloutWriter(tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl, line 8"):
        writer.append(1, group(1), dataclasses.replace(PROMPT, gold=object()))
    writer.append(1, group(1), dataclasses.replace(PROMPT, columns={"size": [9, 9], "raw": b"bytes"}))
    writer.finish_step(1, {})
    (read,) = read_groups(tmp_path)
    assert read.lost == ("raw",)
    assert read.prompt.columns == {"size": [9, 9]}


def test_steps_are_written_in_order(tmp_path):
    writer = write(tmp_path, (1,))
    with pytest.raises(ValueError, match="finish it"):
        writer.append(1, group(4), PROMPT)
    writer.append(2, group(20), PROMPT)
    with pytest.raises(ValueError, match="finish it"):
        writer.append(3, group(30), PROMPT)
    writer.close()
    assert rollout_files.steps(tmp_path) == [1]


def test_rewards_of_stored_answers_are_those_of_the_answers_themselves(tmp_path):
    write(tmp_path, (1,))
    items = next(read_groups(tmp_path)).items(tmp_path)
    assert [item.images for item in items] == [(PICTURE,)] * 4
    assert [item.token_ids for item in items] == [answer.tokens for answer in group(10).answers]
    with rules() as router:
        scores = router.scores(items)
    assert [score.reason for score in scores[2:]] == ["unparsed", "truncated"]
    # [10, 10, 50, 50] in [12, 10, 50, 50] of equal height: IoU is 38 / 40
    assert scores[0].value == pytest.approx((38 / 40 + 1) / 2)
