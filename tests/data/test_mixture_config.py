"""The settings of a mixture: from the command line, into a file and back, and what is refused."""

import dataclasses
import json

import pytest

from jvlm import config as config_tree
from jvlm import options
from jvlm.data.config import DataConfig
from jvlm.data.mixture.config import Mixture, Phase, Source
from jvlm.errors import UserError

TREE = Mixture(
    members={
        "single": Mixture(
            weight=0.8,
            members={"general": Source(("a.jsonl",)), "math": Source(("m.jsonl",), weight=0.5, max_epochs=2.0)},
        ),
        "text": Source(("t.jsonl",), weight=0.1, loss="all"),
    },
    schedule=(Phase(0.5, {"single/math": 2.0}, end=0.75),),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
      data: what is read.
    """

    data: DataConfig = DataConfig(mixture=TREE)


def test_members_are_options_by_their_path_in_the_tree():
    words = "--data.mixture.members.single.members.math.weight 0.7 --data.mixture.members.text.files x.jsonl y.jsonl"
    data = options.override(Run(), words.split(), "train").data
    sources = data.mixture.sources()
    assert sources["single/math"] == dataclasses.replace(TREE.sources()["single/math"], weight=0.7)
    assert sources["text"].files == ("x.jsonl", "y.jsonl")
    assert sources["single/general"] == TREE.sources()["single/general"]
    assert data.mixture.schedule == TREE.schedule


def test_a_member_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean --data.mixture.members.single.members.math.weight"):
        options.override(Run(), ["--data.mixture.members.single.members.maths.weight", "1"], "train")


def test_a_mixture_comes_back_from_json_as_it_was():
    data = DataConfig(mixture=TREE)
    assert config_tree.from_dict(DataConfig, json.loads(json.dumps(config_tree.to_dict(data)))) == data


def test_paths_name_the_leaves_in_order():
    assert list(TREE.sources()) == ["single/general", "single/math", "text"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source(weight=-1.0), r"source.weight must be at least 0, got -1.0"),
        (lambda: Source(files="a.jsonl"), r"source.files is a list, got the text 'a.jsonl'"),
        (lambda: Source(max_epochs=0.0), r"source.max_epochs must be more than 0, got 0.0"),
        (lambda: Mixture(members={"a/b": Source()}), r"'a/b' is no name of a member"),
        (lambda: Mixture(members={"a": 0.5}), r"member 'a' is a float, not a Source or a Mixture"),
        (lambda: Mixture(unit="rows"), r"mixture.unit must be one of 'examples', .*, got 'rows'"),
        (lambda: Mixture(unit="times", temperature=1.0), r"temperature takes the place of weights; unit 'times'"),
        (
            lambda: Mixture(members={"a": Mixture(unit="sequences")}),
            r"'a' has unit 'sequences', .* give it to the root",
        ),
        (lambda: Mixture(members={"a": TREE}), r"'a' has a schedule; give it to the root"),
        (lambda: Mixture(schedule=(Phase(0.1, {"b": 1.0}),)), r"schedule: no member 'b'"),
        (lambda: Mixture(schedule=(Phase(0.5, {}), Phase(0.4, {}))), r"starts at 0.4, before .* ends \(0.5\)"),
        (lambda: Phase(0.5, {}, end=0.5), r"phase.end 0.5 must lie after phase.start 0.5"),
        (lambda: Phase(0.5, {"a": float("nan")}), r"phase.weights of 'a' must be a number of at least 0, got nan"),
        (lambda: DataConfig(train=("a.jsonl",), mixture=TREE), r"give it or data.mixture, not both"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_value(make, message):
    with pytest.raises(UserError, match=message):
        make()
