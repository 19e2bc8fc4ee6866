"""End tokens in every form that configuration files have them, read as transformers reads them."""

import copy
import json

import pytest

import jvlm
from jvlm.errors import UserError
from jvlm.inference.engine import Engine
from jvlm.inference.sampling import SamplingConfig
from jvlm.models.layers import Precision
from jvlm.weights import hf
from tests import idefics2, support

ABSENT = object()
LATER_DEFAULT = 151645  # transformers 4.57 leaves it unset where transformers 5 fills it in


def _with_ends(values, root, nested):
    values = copy.deepcopy(values)
    values.pop("eos_token_id", None)
    if "text_config" not in values:
        values["text_config"] = {k: v for k, v in values.items() if k != "vision_config"}
        values["text_config"]["model_type"] = "qwen2_5_vl_text"
    values["text_config"].pop("eos_token_id", None)
    if root is not ABSENT:
        values["eos_token_id"] = root
    if nested is not ABSENT:
        values["text_config"]["eos_token_id"] = nested
    return values


@pytest.mark.parametrize("nested", [ABSENT, None, 321, [321]], ids=["absent", "null", "one", "list"])
@pytest.mark.parametrize("root", [ABSENT, None, 322, [322, 320]], ids=["absent", "null", "one", "list"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics2"])
def test_the_end_token_is_the_one_that_transformers_resolves(tiny, tmp_path, family, root, nested):
    from transformers import AutoConfig, GenerationConfig

    ids = dict(zip(idefics2.SPECIAL, range(6), strict=True))
    values = tiny.config if family == "qwen2_5_vl" else idefics2.config_values(ids)
    (tmp_path / "config.json").write_text(json.dumps(_with_ends(values, root, nested)))
    theirs = GenerationConfig.from_model_config(AutoConfig.from_pretrained(str(tmp_path))).eos_token_id
    found = hf.read_config(tmp_path, Precision()).eos_token_id
    if theirs is None and found == LATER_DEFAULT:
        assert root in (ABSENT, None)
        assert nested is ABSENT
        return
    assert (list(found) if isinstance(found, tuple) else found) == theirs


@pytest.fixture
def make(tiny, tmp_path):
    """A folder of the tiny checkpoint with other values in its two configuration files."""

    def write(config=None, generation=None):
        support.write_folder(tmp_path, tiny.folder, {**tiny.config, **(config or {})}, limits=(4 * 784, 64 * 784))
        if generation is None:
            (tmp_path / "generation_config.json").unlink()
        else:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (322, None, {322}),
        ([322, 320], None, {320, 322}),
        ([322, 320], {"eos_token_id": 322}, {320, 322}),
        (322, {"eos_token_id": [320]}, {320, 322}),
        (None, {"eos_token_id": 320}, {320}),
        (None, {"eos_token_id": None}, set()),
        ([], {}, set()),
    ],
)
def test_every_end_token_of_both_files_stops_and_survives_both_formats(make, tmp_path, config, generation, ends):
    def stops(model, processor):
        return set(Engine(model, processor).stop_tokens(SamplingConfig()))

    loaded = jvlm.load(make({"eos_token_id": config}, generation))
    assert stops(*loaded) == ends
    for format in ("hf", "jvlm"):
        jvlm.save(*loaded, tmp_path / format, format=format)
        again = jvlm.load(tmp_path / format)
        assert again[0].config.eos_token_id == loaded[0].config.eos_token_id
        assert stops(*again) == ends


@pytest.mark.parametrize("wrong", ["322", True, 1.5, [322, "x"], {"id": 3}])
def test_an_end_token_that_is_no_id_is_refused_with_the_name_of_the_file(make, wrong):
    with pytest.raises(UserError, match=r"config\.json.*eos_token_id holds"):
        jvlm.load(make({"eos_token_id": wrong}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id holds"):
        Engine(*jvlm.load(make(generation={"eos_token_id": wrong})))
