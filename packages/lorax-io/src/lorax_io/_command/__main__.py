"""`python -m lorax_io._command`."""

import sys

from .main import main

sys.exit(main())
