"""The trials of a sweep: every combination of the values that its fields take."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence

from jvlm import configs
from jvlm.errors import UserError

CONFIG, SEED = "config", "seed"
_LONGEST = 48  # characters of a slug: names of jobs on clouds end at 63


@dataclasses.dataclass(frozen=True)
class Vary:
    """A field of the experiment, or "config", and the values that it takes."""

    field: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Vary:
        """Return what "field=a,b,c" says; values that hold commas are given as a JSON list, 'field=["a,b", "c"]'.

        Raises:
          UserError: no field, no value, or one value twice.
        """
        field, equals, listed = text.partition("=")
        field = field.strip().removeprefix("--")
        if not equals or not field:
            raise UserError(f"--vary {text}: write field=value,value, as in --vary optimizer.learning_rate=1e-4,1e-3")
        values = _json_values(text, listed) if listed.startswith("[") else tuple(v.strip() for v in listed.split(","))
        if "" in values:
            raise UserError(f"--vary {text}: a value is empty")
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"--vary {text}: {twice} is given twice")
        return cls(field, values)


def _json_values(text: str, listed: str) -> tuple[str, ...]:
    try:
        values = json.loads(listed)
    except ValueError as error:
        raise UserError(f"--vary {text}: the values begin with [ but are no JSON list ({error})") from error
    if not values:
        raise UserError(f"--vary {text}: the list of values is empty")
    return tuple(value if isinstance(value, str) else json.dumps(value) for value in values)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    Attributes:
      config: its config file or shipped name.
      values: field -> value, of the varied fields in their order.
      slug: the trial's folder: its values in lower-case letters, digits and dashes.
    """

    config: str
    values: Mapping[str, str]
    slug: str

    @property
    def words(self) -> list[str]:
        """The varied fields as command-line words; a value of several words is several."""
        fields = ((field, value) for field, value in self.values.items() if field != CONFIG)
        return [word for field, value in fields for word in (f"--{field}", *value.split())]

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """The varied values except the seed: trials that share them are repetitions of each other."""
        return tuple((field, value) for field, value in self.values.items() if field != SEED)

    def __str__(self) -> str:
        return ", ".join(f"{field}={value}" for field, value in self.values.items())


def trials_of(config: str, varied: Sequence[Vary], *, together: bool = False) -> list[Trial]:
    """Return the trials in the order in which they run: the last field changes fastest.

    Args:
      together: the fields change in step, first values with first values, and are not combined; each such setting is
        run with every seed.

    Raises:
      UserError: nothing is varied, a field twice, or fields together that have different numbers of values.
    """
    if not varied:
        raise UserError("say what to vary: --vary optimizer.learning_rate=1e-4,1e-3")
    names = [vary.field for vary in varied]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--vary {name} is given twice; give all of its values at once")
    seeds = [vary for vary in varied if together and vary.field == SEED]
    fields = [vary for vary in varied if vary not in seeds]
    if together and len({len(vary.values) for vary in fields}) > 1:
        counts = ", ".join(f"{vary.field} has {len(vary.values)}" for vary in fields)
        raise UserError(f"--together needs equally many values of every field: {counts}")
    values = [vary.values for vary in fields]
    settings = zip(*values, strict=True) if together else itertools.product(*values)
    chosen = [dict(zip((vary.field for vary in fields), setting, strict=True)) for setting in settings]
    for vary in seeds:
        chosen = [{**one, SEED: seed} for one in chosen or [{}] for seed in vary.values]
    return [
        Trial(one.get(CONFIG, config), one, slug)
        for one, slug in zip(chosen, _slugs(chosen, _short_names(names)), strict=True)
    ]


def check(trials: Sequence[Trial], fields: Sequence[str]) -> None:
    """Load every trial's experiment, so that a wrong field or value is found before the first one trains.

    Raises:
      UserError: what `configs.load` says, with the trial.
    """
    for trial in trials:
        try:
            configs.load(trial.config, [*fields, *trial.words])
        except UserError as error:
            raise UserError(f"trial {trial}: {error}") from error


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the last part of each field's path, or the whole where two fields share it."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}


def _slugs(chosen: Sequence[Mapping[str, str]], short: Mapping[str, str]) -> list[str]:
    slugs = ["-".join(_plain(f"{short[name]}-{value}") for name, value in one.items()) for one in chosen]
    if len(set(slugs)) < len(slugs) or max(map(len, slugs)) > _LONGEST:
        slugs = [f"{number:03}-{slug}"[:_LONGEST].rstrip("-") for number, slug in enumerate(slugs)]
    return slugs


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
