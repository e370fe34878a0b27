"""`python -m flux_core` is the command line."""

import sys

from .main import main

sys.exit(main())
