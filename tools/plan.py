"""``python tools/plan.py ...`` is ``jvlm plan ...``."""

import sys

from jvlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
