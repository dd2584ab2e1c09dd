"""The entry of the command `lorax`."""

import sys

from ._command import main as main

if __name__ == "__main__":
    sys.exit(main())
