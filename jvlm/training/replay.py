"""Runs batches that gave no finite loss or gradient again: which tower, which conversation, which parameter.

The loss is the supervised one, whatever the task of the run was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jvlm.models import vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import TOWERS, VLM
from jvlm.training import nonfinite
from jvlm.training.nonfinite import NonFiniteBatch
from jvlm.training.optimizer import tower_of
from jvlm.training.supervised import supervised_loss
from jvlm.weights import run_dir


def replay(folder: Path) -> Iterator[str]:
    """Lines that say what is finite, for each batch that a run left in ``<run>/nonfinite/FIRST-LAST``.

    The whole model is differentiated on one device, so that device must hold it twice.

    Raises:
      FileNotFoundError: there are no batches.
    """
    batches = nonfinite.read(folder)
    run = folder.absolute().parents[1]
    template = vlm.abstract(run_dir.model_config(run))
    # beside the checkpoints: of a run in an object store, there
    store = run_dir.checkpoints(run).parent
    params = run_dir.read_params(store / nonfinite.NONFINITE / folder.name / nonfinite.PARAMS, template, check=False)
    yield _line("parameters", ((tower_of(p), p, v) for p, v in params.items()))
    inspect = _Inspection(template)
    for dumped in batches:
        yield f"step {dumped.step}, batch {dumped.number}"
        features, hidden, loss, gradients = inspect(params, dumped.batch)
        outputs = (("encoder", features[0]), ("connector", features[1]), ("decoder", hidden))
        yield _line("  outputs", ((t, "", x) for t, x in outputs if x is not None))
        yield f"  loss        {loss.metrics['loss'].sum:.6g} over weights that sum to {loss.weight:.6g}"
        yield _line("  gradients", ((tower_of(p), p, g) for p, g in gradients.items()))
        yield from _conversations(inspect, params, dumped)


class _Inspection:
    """One compiled forward and backward pass that returns everything in between."""

    def __init__(self, template: VLM):
        def loss(params, batch):
            loss = supervised_loss(vlm.bind(template, params), batch)
            return loss.metrics["loss"].sum, loss

        def both(params, batch: PackedBatch):
            model = vlm.bind(template, params)
            features = (None, None)
            if batch.patches.shape[1]:
                encoded = model.encoder(batch)
                features = (encoded.tokens, model.connector(encoded, batch).tokens)
            gradients, sums = jax.grad(loss, has_aux=True)(params, batch)
            return features, model.hidden(batch).hidden, sums, gradients

        self._run = jax.jit(both)

    def __call__(self, params, batch: PackedBatch):
        return jax.device_get(self._run(params, jax.tree.map(jnp.asarray, batch)))


def _line(title: str, values: Iterable[tuple[str, str, np.ndarray]]) -> str:
    """Whether each tower's arrays are finite, and the first few that are not."""
    bad, names = dict.fromkeys(TOWERS, 0), []
    for tower, name, value in values:
        count = int((~np.isfinite(np.asarray(value, np.float32))).sum())
        bad[tower] += count
        if count and name:
            names.append(f"{name} ({count} of {value.size})")
    towers = ", ".join(f"{t} {f'{n} NOT FINITE' if n else 'finite'}" for t, n in bad.items())
    more = f"; first: {', '.join(names[:4])}" if names else ""
    return f"{title:<14}{towers}{more}"


def _conversations(inspect: _Inspection, params, dumped: NonFiniteBatch) -> Iterator[str]:
    """Each conversation's own loss and gradient: all other loss weights are put to 0."""
    segments = np.asarray(dumped.batch.segment_ids)
    guilty = 0
    for r, sequence in enumerate(dumped.origins):
        for number, origin in enumerate(sequence, 1):
            inside = (segments == number) & (np.arange(len(segments)) == r)[:, None]
            weights = np.where(inside, dumped.batch.loss_weights, 0).astype(np.float32)
            _, _, sums, gradients = inspect(params, dataclasses.replace(dumped.batch, loss_weights=weights))
            norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values())))
            loss = float(sums.metrics["loss"].sum)
            if not (np.isfinite(loss) and np.isfinite(norm)):
                guilty += 1
                yield f"  {origin}: loss {loss:.6g}, gradient norm {norm:.6g}"
    count = sum(map(len, dumped.origins))
    yield f"  {guilty} of {count} conversations are not finite on their own"
