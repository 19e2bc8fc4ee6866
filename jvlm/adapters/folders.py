"""Adapters in folders: PEFT's, and runs of jvlm."""

from __future__ import annotations

from pathlib import Path

from jvlm.adapters import attach, peft_config, plan
from jvlm.adapters.peft_read import ReadBase, read_peft
from jvlm.adapters.weights import AdapterWeights
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.vlm import VLMConfig
from jvlm.weights import run_dir


def read(source: str | Path, config: VLMConfig, read_base: ReadBase | None = None) -> AdapterWeights:
    """Return the adapter of a folder, for a model of this configuration.

    Args:
      source: a PEFT folder, or the folder of a run that trained adapters (``runs/demo``, ``runs/demo/best``).
      read_base: gives a parameter of the base, which some PEFT folders need; see `jvlm.adapters.peft_read.read_peft`.

    Raises:
      UserError: a folder that holds neither; an adapter of another model.
    """
    folder, best = run_dir.split_best(Path(source))
    folder = run_dir.local(folder if best else source)
    if (folder / peft_config.FILE).is_file():
        return read_peft(folder, config, read_base=read_base)
    trained = plan.read(folder) if folder.is_dir() else None
    if trained is None:
        raise UserError(
            f"{source} holds no adapter: neither {peft_config.FILE} (PEFT) nor {plan.FILE} (a run that trained "
            "adapters); a whole model is given as init_from (--model)"
        )
    template = attach.structure(vlm.abstract(config), trained)
    params = run_dir.params_folder(folder, best)
    stored = run_dir.stored_paths(params)
    wanted = {path: want for path, want in run_dir.wanted_arrays(template).items() if path in stored}
    shapes = {path: variable.get_value() for path, variable in vlm.variables(template).items()}
    return attach.extract(vlm.bind(template, {**shapes, **run_dir.read_arrays(params, wanted)}))
