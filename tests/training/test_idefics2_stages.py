"""Idefics2's stages with adapters: what of the 8B model they train, in numbers; and a run of the last, small."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import jvlm
from jvlm import configs, families
from jvlm.adapters import targets
from jvlm.models import vlm
from jvlm.training import runs, trainable
from jvlm.training.config import ExportConfig
from jvlm.training.hooks import Hook
from jvlm.training.interruption import Interrupted
from jvlm.training.optimizer.config import matches
from tests.idefics2 import write_folder
from tests.training import support

STAGES = ("idefics2/stage1_lora", "idefics2/stage2_lora", "idefics2/sft_dora")
NEW_TOKENS = (32000, 32001, 32002)


@pytest.fixture(scope="module")
def base():
    """(configuration, parameters) of Idefics2-8B, without arrays."""
    config = families.preset("idefics2_8b")
    return config, vlm.parameters(vlm.abstract(config))


@pytest.mark.parametrize("name", STAGES)
def test_so_many_parameters_are_trained_as_the_authors_code_counts(base, name):
    """huggingface/smollm, vision/m4, on shapes of Idefics2-8B; there the output matrix has an adapter as well."""
    config, parameters = base
    experiment = configs.load(name)
    plan = targets.resolve(experiment.adapter, config, NEW_TOKENS)
    modules = [m for m in targets.modules_of(config) if m.target.path in {group.path for group in plan.groups}]
    assert len(modules) == 387 - 1
    head = 64 * (4096 + 32003)
    assert sum(64 * (m.d_in + m.d_out) for m in modules) == 204_863_680 - head
    magnitudes = sum(m.d_out for m in modules if plan.group(m.target.path).magnitude)
    assert magnitudes == (206_543_667 - 204_863_680 - 32003 if experiment.adapter.use_dora else 0)
    sizes = {path: parameters[path].get_value().size for path in plan.parameters}
    norms = [path for path in sizes if "norm" in path and not path.startswith("connector.")]
    connector = [path for path in sizes if path.startswith("connector.")]
    rest = set(sizes) - set(norms) - set(connector)
    assert sum(sizes[path] for path in connector) == 743_219_200
    assert sum(sizes[path] for path in norms) == 392_960
    assert rest == {"encoder.patch_embed.kernel", "encoder.patch_embed.bias", "encoder.positions"}
    assert sum(sizes[path] for path in rest) == 6_323_328
    assert plan.token_ids == NEW_TOKENS
    assert plan.config.init == "gaussian"


def test_the_stages_differ_as_published(base):
    _, parameters = base
    one, two, three = map(configs.load, STAGES)
    assert [e.adapter.use_dora for e in (one, two, three)] == [False, False, True]
    assert one.optimizer == two.optimizer
    assert (one.optimizer.schedule, one.optimizer.warmup_steps, one.optimizer.learning_rate) == ("linear", 2000, 1e-4)
    assert (one.processor.image.longest_edge, two.processor.image.longest_edge) == (384, 980)
    assert (two.adapt.grid, three.task.neftune_alpha, three.task.neftune_where) == (70, 5.0, "merged")
    trainable.check_patterns(one.optimizer, parameters)
    spared = {path for path in parameters if matches(path, one.optimizer.no_decay)}
    assert {path.split(".")[1] for path in spared} == {"latents", "blocks"}, "the perceiver, not the projection"


class Stop(Hook):
    """Stops a run after step 2."""

    def on_step_end(self, trainer, result):
        if result.step == 2:
            trainer.stop("the test")


@pytest.mark.slow
def test_a_stage_runs_and_one_that_was_stopped_goes_on_to_the_same_bits_with_its_average(tmp_path):
    """With everything that is drawn or kept: dropout, noise, shuffled turns, larger images, 8-bit moments, average."""
    write_folder(tmp_path / "start", split=True)
    examples = support.write_examples(tmp_path / "data", 12)
    options = {
        "--init_from": str(tmp_path / "start"),
        "--data.train": str(examples),
        "--data.batch_size": "2",
        "--data.seq_len": "384",
        "--data.max_patches": "512",
        "--data.max_image_patches": "64",
        "--data.pack_window": "4",
        "--processor.image.longest_edge": "112",
        "--processor.image.shortest_edge": "28",
        "--optimizer.kind": "adamw_8bit",
        "--optimizer.ema_decay": "0.5",
        "--optimizer.encoder_max_grad_norm": "0.5",
        "--optimizer.learning_rate": "1e-3",
        "--gradient_accumulation_steps": "2",
        "--steps": "4",
        "--log_interval_steps": "1",
        "--checkpoint.save_interval_steps": "2",
        "--name": "run",
    }
    plain = configs.load("idefics2/sft_dora", [text for pair in options.items() for text in pair])
    plain = dataclasses.replace(
        plain, adapter=dataclasses.replace(plain.adapter, rank=4), export=ExportConfig(enabled=False)
    )
    at = lambda name, **changes: dataclasses.replace(plain, output_root=str(tmp_path / name), **changes)  # noqa: E731
    whole = runs.train(at("whole"))
    raw = runs.train(at("raw", optimizer=dataclasses.replace(plain.optimizer, use_ema=False)))
    with pytest.raises(Interrupted):
        runs.train(at("stopped", hooks=(Stop(),)))
    again = runs.train(at("stopped"))
    assert support.losses(tmp_path / "stopped") == support.losses(tmp_path / "whole")
    loaded = [jvlm.load(tmp_path / name / "run")[0] for name in ("whole", "raw")]
    models = [whole.model, again.model, raw.model, *loaded]
    values = [{p: np.asarray(v.get_value()) for p, v in vlm.variables(model).items()} for model in models]
    for path, value in values[0].items():
        np.testing.assert_array_equal(value, values[1][path], err_msg=path)
        np.testing.assert_array_equal(value, values[3][path], err_msg=f"{path}: the run's folder gives the average")
        np.testing.assert_array_equal(values[2][path], values[4][path], err_msg=path)
    differ = {path for path, value in values[0].items() if not np.array_equal(value, values[2][path])}
    assert any(path.endswith(".adapter.b") for path in differ), "the average is not the last step"
    assert any(path.startswith("connector.") for path in differ)
