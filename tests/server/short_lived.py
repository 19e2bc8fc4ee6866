"""Run by test_front.py in the place of ``jvlm.cli``: engines are started again that lived for seconds, not a minute."""

import sys

from jvlm import cli
from jvlm.server import replicas

if __name__ == "__main__":
    replicas._LEAST_LIFE = 5.0
    sys.exit(cli.main())
