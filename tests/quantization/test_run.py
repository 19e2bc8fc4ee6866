"""Runs on a quantised base: nothing of it is trained or stored, a restart and a loaded run have it again."""

import dataclasses

import numpy as np
import pytest

import jvlm
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.kernels import is_part
from jvlm.training import runs
from jvlm.weights import frozen, run_dir
from tests.training import support

QUANTIZE = QuantizationConfig("int8")
OPTIONS = ("--optimizer.encoder_lr", "0", "--optimizer.decoder_lr", "0", "--export.enabled", "False")


def _values(model):
    return {path: np.asarray(v.get_value()) for path, v in vlm.parameters(model).items()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    examples = support.write_examples(folder / "data", 6)
    start = support.experiment(folder, examples, *OPTIONS)
    from jvlm.training.starting_model import start_model

    jvlm.save(*start_model(start), folder / "base")
    experiment = support.experiment(
        folder, examples, *OPTIONS, "--init_from", str(folder / "base"), "--steps", "2", quantize=QUANTIZE
    )
    return folder, experiment, runs.train(experiment)


def test_a_run_trains_beside_a_quantised_base_which_stays_and_is_read_again(begun):
    folder, experiment, result = begun
    base = _values(jvlm.load(folder / "base", quantize=QUANTIZE)[0])
    found = _values(result.model)
    assert any(is_part(path) for path in found)
    for path, value in found.items():
        assert path.startswith("connector.") != np.array_equal(value, base[path]), path
    record = frozen.read(folder / "run")
    assert record.param_dtype == "float32"
    assert any(is_part(path) for path in record.fingerprints)
    assert run_dir.stored_paths(run_dir.params_folder(folder / "run")) == {
        p for p in found if p.startswith("connector.")
    }
    loaded = _values(jvlm.load(folder / "run")[0])
    assert all(np.array_equal(loaded[path], value) for path, value in found.items())
    further = runs.train(dataclasses.replace(experiment, steps=3, accept_changes=True))
    after = _values(further.model)
    assert all(np.array_equal(after[p], v) for p, v in found.items() if not p.startswith("connector."))


def test_what_is_quantised_cannot_be_trained(begun):
    _, experiment, _ = begun
    trained = dataclasses.replace(
        experiment, name="other", optimizer=dataclasses.replace(experiment.optimizer, decoder_lr=1e-4)
    )
    with pytest.raises(
        UserError, match=r"quantised matrices cannot be trained, and 14 of their parts would be, as decoder"
    ):
        runs.train(trained)


def test_a_loaded_run_keeps_its_own_quantisation(begun):
    folder, _, _ = begun
    with pytest.raises(UserError, match="was trained on a base quantised as"):
        jvlm.load(folder / "run", quantize=QuantizationConfig("fp8"))
    with pytest.raises(UserError, match="was trained on a quantised base"):
        frozen.open_run(folder / "run", {})
