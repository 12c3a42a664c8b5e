"""Run the command line with `python -m ltx2ref.cli`."""

import sys

from . import main

sys.exit(main())
