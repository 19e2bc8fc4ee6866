"""Configurations in saved files: their types by tag, every field, and what is wrong with a file by name."""

import dataclasses
import json
import re

import pytest

from jvlm import config as config_tree
from jvlm import configs, families
from jvlm.adapters.config import AdapterConfig
from jvlm.data.image_processor import ImageProcessorConfig
from jvlm.errors import UserError
from jvlm.models import contracts, registry
from jvlm.models.encoders.vit import ViTConfig
from jvlm.models.vlm import VLMConfig
from jvlm.tags import Tagged
from jvlm.weights import run_dir


@pytest.mark.parametrize(
    "name", ["mimo_vl/easy_vqa", "mm1_5/easy_vqa", "mm1_5/moe", "idefics2/pretrain", "idefics2/sft"]
)
def test_what_an_experiment_holds_comes_back_from_its_file_as_it_was(name):
    experiment = configs.load(name)
    for field in ("model", "processor", "adapt", "data", "optimizer", "parallel"):
        part = getattr(experiment, field)
        if part is not None:
            assert config_tree.from_dict(type(part), json.loads(json.dumps(config_tree.to_dict(part)))) == part


def test_a_value_of_one_of_two_types_comes_back_from_its_file_as_it_was():
    config = AdapterConfig(train_tokens=("<|im_end|>", 7, "7"))
    values = json.loads(json.dumps(config_tree.to_dict(config)))
    assert config_tree.from_dict(AdapterConfig, values).train_tokens == ("<|im_end|>", 7, "7")


def _types():
    families.load_all()
    registry.load_all()
    bases = (*contracts.KINDS, ImageProcessorConfig)
    # not those of other tests
    return {b: {t: k for t, k in b.types.items() if k.__module__.startswith("jvlm.")} for b in bases}


def test_tags_are_what_saved_files_have():
    """A tag that changes breaks every saved run: this list only grows."""
    assert {kind.__name__: sorted(types) for kind, types in _types().items()} == {
        "EncoderConfig": ["qwen2_vit", "qwen3_vit", "qwen_vit", "vit"],
        "ConnectorConfig": [
            "c_abstractor",
            "deepstack_merger",
            "patch_merger",
            "perceiver",
            "pixel_shuffle",
            "pooled_mlp",
        ],
        "DecoderConfig": ["cross_attention_transformer", "transformer"],
        "MLPConfig": ["moe"],
        "ImageProcessorConfig": ["idefics2", "idefics3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm", "tiled"],
    }


@pytest.fixture
def renamed():
    name, ViTConfig.__name__ = ViTConfig.__name__, "RenamedConfig"
    yield
    ViTConfig.__name__ = name


def test_a_class_with_another_name_reads_and_writes_the_same_files(renamed):
    before = config_tree.to_dict(configs.load("idefics2/pretrain").model)
    model = config_tree.from_dict(VLMConfig, before)
    assert type(model.encoder).__name__ == "RenamedConfig"
    assert config_tree.to_dict(model) == before
    assert "RenamedConfig" not in json.dumps(before)
    assert "ViTConfig" not in json.dumps(before)


def test_a_type_without_a_tag_of_its_own_is_not_written():
    @dataclasses.dataclass(frozen=True)
    class Derived(ViTConfig):
        """A type that no file can name."""

    with pytest.raises(TypeError, match="Derived has no tag"):
        config_tree.to_dict(Derived())


def test_a_tag_belongs_to_one_type():
    class Base(Tagged):
        pass

    class First(Base, tag="one"):
        pass

    with pytest.raises(TypeError, match=r"'one' of .*Second is that of .*First already"):

        class Second(Base, tag="one"):
            pass

    assert Base.types == {"one": First}


CHANGES = {
    "an unknown tag": (
        lambda v: v["model"]["encoder"].update(type="vitt"),
        r"model\.encoder\.type: 'vitt' is unknown; did you mean 'vit'\? known: .*qwen_vit",
    ),
    "a tag of another kind": (
        lambda v: v["model"]["encoder"].update(type="moe"),
        r"model\.encoder\.type: 'moe' is unknown; known: ",
    ),
    "no tag": (lambda v: v["model"]["encoder"].pop("type"), r"model\.encoder.* needs a \"type\""),
    "an unknown field": (
        lambda v: v["model"]["decoder"].update(vocab_sizes=1),
        r"unknown field 'model\.decoder\.vocab_sizes'; did you mean 'vocab_size'\?",
    ),
    "a missing field": (
        lambda v: v["model"]["decoder"].pop("num_layers"),
        r"missing field 'model\.decoder\.num_layers'",
    ),
    "a wrong type": (
        lambda v: v["model"]["decoder"].update(num_layers="two"),
        r"model\.decoder\.num_layers: 'two' is not of type",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_wrong_with_a_saved_experiment_is_named_with_its_file(tmp_path, change):
    values = config_tree.to_dict(configs.load("idefics2/pretrain"))
    wrong, says = CHANGES[change]
    wrong(values)
    path = tmp_path / run_dir.EXPERIMENT
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + says):
        run_dir.model_config(tmp_path)


OWN_TASK = """
import dataclasses

from jvlm.training.config import Experiment
from jvlm.training.task import Task


@dataclasses.dataclass(frozen=True)
class Weighted(Task):
    \"\"\"A task of one's own.

    Attributes:
      weight: of the loss.
    \"\"\"

    weight: float = 1.0
    names: dict = dataclasses.field(default_factory=dict)

    def loss(self, model, batch, *, reference=None, rng=None, denominators=None):
        raise AssertionError


def get_config():
    return Experiment(name="own", init_from="base", task=Weighted())
"""


@pytest.mark.parametrize("first", ["", "from __future__ import annotations\n"])
def test_fields_of_a_task_are_options_those_of_one_s_own_too(tmp_path, first):
    (tmp_path / "own.py").write_text(first + OWN_TASK)
    path = str(tmp_path / "own.py")
    assert configs.load(path, ["--task.weight", "2.5"]).task.weight == 2.5
    with pytest.raises(UserError, match=r"no option --task\.neftune_alpha"):
        configs.load(path, ["--task.neftune_alpha", "5"])
    shipped = configs.load("mimo_vl/easy_vqa", ["--task.neftune_alpha", "5", "--task.neftune_where", "merged"])
    assert (shipped.task.neftune_alpha, shipped.task.neftune_where) == (5.0, "merged")
    with pytest.raises(UserError, match=r"task\.neftune_alpha must be at least 0, got -1"):
        configs.load("mimo_vl/easy_vqa", ["--task.neftune_alpha", "-1"])


def test_every_shipped_config_holds_its_model_so_that_it_can_be_planned():
    # composed of towers on disk, or for what a run of the demo exports
    from_folders = {
        "align/mimo_7b_reward_model",
        *(name for name in configs.shipped() if name.startswith("backbones/")),
        "finetune/white_cells",
        "align/easy_vqa_rl",
    }
    without = [name for name in set(configs.shipped()) - from_folders if configs.load(name).model is None]
    assert without == []
