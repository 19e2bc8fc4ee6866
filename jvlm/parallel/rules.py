"""Rules from the logical axes that models name to the mesh axes that split them, one line each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from jvlm.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules(Mapping[str, tuple[str, ...]]):
    """Mesh axes that split each logical axis, in order of precedence. Hashable, and equal line by line."""

    lines: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self):
        object.__setattr__(self, "_by_axis", dict(self.lines))

    def __getitem__(self, axis: str) -> tuple[str, ...]:
        return self._by_axis[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_axis)

    def __len__(self) -> int:
        return len(self.lines)


_STANDARD: dict[str, str] = {
    # activations
    "batch": "data fsdp expert",
    "sequence": "context",
    "patches": "context",
    "vision_tokens": "context",
    # parameters, and the activations they make; of two axes of one parameter the upper one has precedence
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "embed": "fsdp",
    "patch": "",
    "position": "",
    "norm": "",
    "rank": "",
}

TABLES: Mapping[str, Rules] = MappingProxyType(
    {
        name: Rules(tuple((axis, tuple(axes.split())) for axis, axes in table.items()))
        for name, table in {
            "standard": _STANDARD,
            # parameters also stored as shards over `context`: less memory for long sequences, more to gather
            "store_over_context": {**_STANDARD, "embed": "fsdp context"},
            # generation reads every parameter for each token: each device reads its shard and nothing is gathered.
            # `embed` is split only where the other side of a matrix does not divide. A step has one new token for each
            # sequence, so sequences are not split, and `fsdp` is more of them.
            "serving": {**_STANDARD, **dict.fromkeys("sequence patches vision_tokens".split(), ""), "embed": "tensor"},
            # every device holds all parameters
            "replicated": {**_STANDARD, **dict.fromkeys("embed heads kv_heads mlp vocab experts".split(), "")},
        }.items()
    }
)


def table(name: str, override: Sequence[str] = ()) -> Rules:
    """Return a table by name, with the rules of ``override`` ("heads=tensor", "embed=fsdp+context", "vocab=") in place.

    Raises:
      UserError: an unknown table, or a rule that cannot be read.
    """
    if name not in TABLES:
        raise UserError(f"parallel.rules: no table {name!r}; there are {', '.join(TABLES)}")
    rules = dict(TABLES[name])
    for line in override:
        axis, equals, axes = line.partition("=")
        chosen = tuple(a for a in axes.split("+") if a)
        unknown = [a for a in chosen if a not in AXES]
        if not equals or unknown:
            raise UserError(f"parallel.override: {line!r} should read axis=mesh axes joined by +, of {', '.join(AXES)}")
        if axis not in rules:
            near = difflib.get_close_matches(axis, rules, n=1)
            raise UserError(f"parallel.override: no axis {axis!r}; {f'did you mean {near[0]!r}?' if near else ''}")
        rules[axis] = chosen
    return Rules(tuple(rules.items()))
