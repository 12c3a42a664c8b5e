"""Run the command line with `python -m ltx2ref`."""

import sys

from .cli import main

sys.exit(main())
