"""`make meshes`: loss and gradients of all architectures, and of adapters, on every mesh, against one device."""

from __future__ import annotations

import json
import sys

from tests.parallel import adapters_on_meshes, models
from tests.support import cpu_devices, run_python

BOUND = 1e-5


def main() -> int:
    """Exit status 1 if a difference is above the bound."""
    bad = 0
    print(f"{'architecture':<24}{'mesh':<24}{'loss':>12}{'difference':>12}{'of gradients':>14}")
    runs = [("many_devices", name) for name in models.ARCHITECTURES]
    runs += [("adapters_on_meshes", name) for name in adapters_on_meshes.CASES]
    for module, architecture in runs:
        names = tuple(name for name in models.MESHES if name != "one" or module == "many_devices")
        code = f"from tests.parallel.{module} import main; main({architecture!r}, *{names!r})"
        title = architecture if module == "many_devices" else f"{architecture}, adapters"
        for text in run_python(code, timeout=7200, **cpu_devices(8)).splitlines():
            line = json.loads(text)
            loss, gradients = line["loss_difference"], line["gradient_difference"]
            print(f"{title:<24}{line['mesh']:<24}{line['loss']:>12.6f}{loss:>12.1e}{gradients:>14.1e}", flush=True)
            # adapters' random second matrices make gradients above 1
            bad += not (loss < BOUND and gradients < BOUND * max(1, 2 * line.get("largest_gradient", 0.5)))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
