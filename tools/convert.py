"""``python tools/convert.py ...`` is ``jvlm convert ...``."""

import sys

from jvlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
