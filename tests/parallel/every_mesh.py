"""`make meshes`: loss and gradients of every architecture on every shape of mesh, against one device, as a table."""

from __future__ import annotations

import json
import sys

from tests import one_platform  # noqa: F401
from tests.parallel import models
from tests.support import cpu_devices, run_python

BOUND = 1e-5


def main() -> int:
    """Exit status 1 if a difference is above the bound."""
    bad = 0
    print(f"{'architecture':<14}{'mesh':<24}{'loss':>12}{'difference':>12}{'of gradients':>14}")
    for architecture in models.ARCHITECTURES:
        names = tuple(models.MESHES)
        code = f"from tests.parallel.many_devices import main; main({architecture!r}, *{names!r})"
        for text in run_python(code, timeout=7200, **cpu_devices(8)).splitlines():
            line = json.loads(text)
            loss, gradients = line["loss_difference"], line["gradient_difference"]
            print(
                f"{architecture:<14}{line['mesh']:<24}{line['loss']:>12.6f}{loss:>12.1e}{gradients:>14.1e}", flush=True
            )
            bad += not (loss < BOUND and gradients < BOUND)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
