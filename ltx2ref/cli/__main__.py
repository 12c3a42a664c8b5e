"""`python -m ltx2ref.cli` is `ltx2ref`."""

import sys

from . import main

sys.exit(main())
