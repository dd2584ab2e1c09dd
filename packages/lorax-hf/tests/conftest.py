"""Collects only the tests of the parts whose packages are installed."""

import lorax_hf._extras as extras


def _is_missing(extra: str) -> bool:
    try:
        extras.need(extra)
    except ImportError:
        return True
    return False


FOLDERS = {"flax": "flax_models", "torch": "torch_modules"}
collect_ignore = [folder for extra, folder in FOLDERS.items() if _is_missing(extra)]
