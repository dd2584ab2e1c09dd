"""The command `lorax` inspects, checks, compares, converts, combines and merges adapters."""

import argparse
import warnings
from collections.abc import Sequence

import jax

from lorax import LoraxError

from . import combine, convert, diff, extract, inspect, merge, resize, verify
from .options import FAILED, console


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 if adapters differ, 2 after an error."""
    args = _parser().parse_args(arguments)
    # Nothing is trained here, so no accelerator is needed; 64-bit types must not be shortened.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    errors = console(stderr=True, soft_wrap=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            code = args.run(args)
            if "renaming" in args:
                args.renaming.warn_unused()
        except (LoraxError, OSError, ImportError) as error:
            errors.print(f"lorax: {error}")
            for note in getattr(error, "__notes__", ()):
                errors.print(note)
            code = FAILED
    # Each message once: an adapter may be opened twice.
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        errors.print(f"lorax: warning: {message}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in (inspect, verify, diff, convert, merge, combine, resize, extract):
        name = module.__name__.rpartition(".")[2]
        added = commands.add_parser(name, help=module.HELP, description=module.run.__doc__)
        added.set_defaults(run=module.run)
        module.add_arguments(added)
    return parser
