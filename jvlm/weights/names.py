"""Names of a checkpoint's tensors: which spelling of the table's they are, and what is wrong where they are none."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from jvlm.weights.safetensors_files import Tensors
from jvlm.weights.table import WeightError

# What DistributedDataParallel, torch.compile, FSDP, checkpoint_wrapper and a merged PEFT model leave in names.
_WRAPPER = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
)
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|absmax|SCB)$")
_ADAPTER = re.compile(r"\.(lora_|base_layer\.|modules_to_save\.|original_module\.)")


def canonical_names(tensors: Tensors, canonical: Callable[[str], str | None], expected: set[str]) -> dict[str, str]:
    """Return table name -> stored name of every tensor that ``canonical`` keeps.

    Names that a training wrapper lengthened are read without its words, where that makes them right.

    Args:
      canonical: maps any known spelling to the table's; None drops the tensor.
      expected: names of the table.

    Raises:
      WeightError: a name under two spellings; the weights of an adapter; quantised weights; a beginning that all names
        have too much; or no name that is expected.
    """
    names = _by_canonical_name(tensors, canonical)
    if expected <= set(names):
        return names
    raws, matching = tensors.names(), len(expected & set(names))
    adapters = [raw for raw in raws if _ADAPTER.search(raw)]
    if adapters:
        raise WeightError(
            f"{tensors.folder} holds {len(adapters)} tensors of an adapter ({adapters[0]}, ...), which are no model: "
            "merge the adapter into its model (merge_and_unload in PEFT), save that, and give its folder"
        )
    packed = [raw for raw in raws if _QUANTISED.search(raw)]
    if packed:
        raise WeightError(
            f"{tensors.folder} holds quantised weights ({packed[0]} and {len(packed) - 1} more tensors of that kind), "
            "which are not read: give the folder that they were made from"
        )
    shortened = _by_canonical_name(tensors, lambda raw: canonical(_WRAPPER.sub("", raw)))
    if len(expected & set(shortened)) > matching:
        print(
            f"{tensors.folder}: names of tensors are read without what a wrapper put into them ({raws[0]}, ...)",
            file=sys.stderr,
        )
        return shortened
    for prefix in _prefixes(raws):
        if len(expected & {canonical(raw.removeprefix(prefix)) for raw in raws}) > max(matching, len(expected) // 2):
            raise WeightError(
                f"{tensors.folder}: all {len(raws)} names of tensors begin with {prefix!r}, which this model's do not: "
                f"take it off and save again ({raws[-1]} becomes {raws[-1].removeprefix(prefix)})"
            )
    if not matching:
        raise WeightError(
            f"{tensors.folder} holds none of the {len(expected)} tensors of this model; it has {len(raws)} others, "
            f"{', '.join(raws[:3])}, ..., where {', '.join(sorted(expected)[:3])}, ... are expected: it is another "
            "model, or config.json is another model's"
        )
    return names


def _prefixes(names: list[str]) -> list[str]:
    """Whole words that all names begin with, the shortest first."""
    words = names[0].split(".")[:-1] if names else []
    prefixes = (".".join(words[:n]) + "." for n in range(1, len(words) + 1))
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]


def _by_canonical_name(tensors: Tensors, canonical: Callable[[str], str | None]) -> dict[str, str]:
    """Table name -> stored name of every tensor that ``canonical`` keeps."""
    stored: dict[str, str] = {}
    for raw in tensors.names():
        name = canonical(raw)
        if name is None:
            continue
        if name in stored:
            raise WeightError(f"{tensors.folder} holds {name} twice: as {stored[name]} and as {raw}")
        stored[name] = raw
    return stored
