"""`python -m ltx2ref` is `ltx2ref`."""

import sys

from .cli import main

sys.exit(main())
