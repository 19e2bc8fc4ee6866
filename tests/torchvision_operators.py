"""Names of torchvision's operators, for programs that need no more of it than its functions of pixels.

Its own kernels were built for one torch. Beside another one torchvision cannot be imported unless the operators that
its modules mention are declared. Importing this module, before anything that imports torchvision, declares them.
"""

import importlib.util

from torch import library

if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        LIBRARY = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
