"""KTO on a small model with pictures: its divergence, its weights, and the shift of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvlm.data import packing
from jvlm.data.config import DataConfig
from jvlm.data.encode import Encode
from jvlm.data.example_source import ExampleSource
from jvlm.data.pipeline import complete_window
from jvlm.data.segments import segment_of
from jvlm.models import vlm
from jvlm.preference import log_probs
from jvlm.preference.labels import LabelledTask
from jvlm.training.supervised import token_log_probs
from tests.preference.support import moved, write_labels


@pytest.fixture(scope="module")
def examples(tiny, tmp_path_factory):
    path = write_labels(tmp_path_factory.mktemp("labels"), 4)
    config = DataConfig(train=(str(path),), preference="labels", seq_len=256, max_patches=512)
    source, encode = ExampleSource.of(config), Encode(tiny.processor, config)
    places = [encode.random_map(source[n], np.random.default_rng(0)) for n in range(4)]
    return [one for place in complete_window(places, config) for one in place]


def test_packed_answers_have_the_loss_of_answers_by_themselves(tiny, examples):
    task = LabelledTask(desirable_weight=1.33, undesirable_weight=0.8, beta=0.5)
    models = [moved(tiny.model), {path: v.get_value() for path, v in vlm.variables(tiny.model).items()}]
    bound = jax.jit(lambda values, batch: token_log_probs(vlm.bind(tiny.model, values), batch))
    ratios = np.zeros((len(examples), 2))
    for row, example in enumerate(examples):
        for number in (1, 2):
            batch = packing.assemble([[segment_of(example, number)]], 128, 512)
            one, other = (np.asarray(bound(values, batch), np.float64).sum() for values in models)
            ratios[row, number - 1] = one - other
    good = np.asarray([example.values[0]["desirable"] for example in examples]) > 0
    assert good.any()
    assert not good.all()
    shift = max(ratios[:, 1].mean(), 0.0)
    sign = np.where(good, 1, -1)
    losses = np.where(good, 1.33, 0.8) * (1 - 1 / (1 + np.exp(-task.beta * sign * (ratios[:, 0] - shift))))
    batch = packing.packed_sequences(
        packing.assemble([examples[:2], examples[2:]], 384, 768), [examples[:2], examples[2:]], (), ()
    )
    arrays = jax.tree.map(jnp.asarray, task.batch_of(batch))
    found = jax.jit(lambda: task.loss(vlm.bind(tiny.model, models[0]), arrays, reference=tiny.model))()
    assert float(found.total / found.weight) == pytest.approx(losses.mean(), abs=1e-5)
    assert float(found.metrics["kl"].sum / found.metrics["kl"].count) == pytest.approx(shift, abs=1e-4)
    rewards = task.beta * ratios[:, 0]
    for name, chosen in (("chosen", good), ("rejected", ~good)):
        mean = found.metrics[f"rewards/{name}"]
        assert float(mean.sum / mean.count) == pytest.approx(rewards[chosen].mean(), abs=1e-4)


def test_a_window_of_one_example_has_no_neighbour_to_measure_with(tiny, examples):
    config = DataConfig(preference="labels", seq_len=256, max_patches=512)
    ((alone,),) = complete_window([[examples[0]]], config)
    assert not alone.loss_weights[alone.segments == 2].any()
    assert log_probs.room(256) == 128
