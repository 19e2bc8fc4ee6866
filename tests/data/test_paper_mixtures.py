"""The shipped mixtures of papers against their published numbers."""

import pytest

from jvlm import configs
from jvlm.data.mixture.config import Mixture
from jvlm.data.mixture.plan import enters, plan_of
from jvlm.data.mixture.shares import SourceSize, shares_of

# MM1.5, figure 2 and section 3.3: percent of the fine-tuning examples
MM1_5 = {
    "single/general": 11.27,
    "single/text_rich": 37.18,
    "single/refer_ground": 22.54,
    "single/math": 5.63,
    "single/code": 2.25,
    "single/science": 1.13,
    "multi": 10.0,
    "text": 10.0,
}


def _percent(mixture: Mixture) -> dict[str, float]:
    sizes = {name: SourceSize(1000) for name in enters(mixture)}
    return {name: round(100 * float(share), 2) for name, share in shares_of(mixture, sizes).of.items()}


def test_mm1_5_has_the_published_shares():
    assert _percent(configs.module("mixtures/mm1_5").mixture()) == MM1_5


def test_mm1_5_s_ablations_leave_categories_out():
    recipes = configs.module("mixtures/mm1_5")
    base, single = _percent(recipes.base()), _percent(recipes.single_image())
    assert set(base) == {f"single/{name}" for name in ("general", "text_rich", "science", "math", "code")}
    assert set(single) == {*base, "single/refer_ground"}
    assert single["single/refer_ground"] == round(100 * 2 / 7.1, 2)
    assert _percent(recipes.mixture(alpha={"math": 0.0}, text=0.0)).keys() == MM1_5.keys() - {"single/math", "text"}


def test_the_cauldron_gives_the_effective_numbers_of_examples():
    mixture = configs.module("mixtures/cauldron").mixture()
    assert len(mixture.members) == 62
    # examples of the set (table 14's images, questions where a set has no images) and what a pass draws of them
    sets = {
        "vqav2": (82_772, 57_940),
        "localized_narratives": (507_444, 20_298),
        "openhermes": (1_006_223, 10_062),
        "websight": (500_000, 100),
    }
    sizes = {name: SourceSize(sets[name][0] if name in sets else 1000) for name in mixture.members}
    shares = shares_of(mixture, sizes)
    for name, (_, drawn) in sets.items():
        assert round(float(shares.of[name] * shares.examples_per_pass)) == drawn
    plan = plan_of(mixture, sizes)
    drawn = dict(zip(plan.names, plan.drawn(plan.examples_per_pass).tolist(), strict=True))
    assert all(abs(drawn[name] - count) <= 2 for name, (_, count) in sets.items())


@pytest.mark.parametrize(("stage", "count"), [(1, 1), (2, 2), (3, 10), (4, 15)])
def test_a_stage_of_mimo_vl_has_what_those_before_have_and_more(stage, count):
    recipes = configs.module("mixtures/mimo_vl")
    assert len(recipes.mixture(stage, weights={"captions": 0.5}).members) == count


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("mm1_5", [{"single/maths": ()}]), ("cauldron", [{"vqa": ()}]), ("mimo_vl", [1, {"gui": ()}])],
)
def test_files_of_a_set_that_there_is_not_are_refused(name, arguments):
    with pytest.raises(ValueError, match="unknown"):
        configs.module(f"mixtures/{name}").mixture(*arguments)
