"""The command `lorax`."""

from .main import main as main
