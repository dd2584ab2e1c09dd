"""Entry point of the `lorax` command."""

import sys

from ._command import main as main

if __name__ == "__main__":
    sys.exit(main())
