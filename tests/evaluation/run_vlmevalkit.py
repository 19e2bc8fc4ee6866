"""VLMEvalKit's command, also where torchvision's kernels were built for another torch. See `every_harness`.

Its data sets import torchvision for functions of pixels, which need none of these kernels: their names are enough.
"""

import runpy

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # operator torchvision::nms does not exist
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    runpy.run_module("vlmeval", run_name="__main__")
