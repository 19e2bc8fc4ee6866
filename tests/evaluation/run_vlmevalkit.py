"""VLMEvalKit's command, also where torchvision's kernels were built for another torch: its data sets import it for
functions of pixels. See `every_harness`.
"""

import runpy

import tests.torchvision_operators  # noqa: F401

if __name__ == "__main__":
    runpy.run_module("vlmeval", run_name="__main__")
