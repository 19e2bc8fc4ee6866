"""``python -m jvlm.cli`` is ``jvlm``."""

import sys

from jvlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
