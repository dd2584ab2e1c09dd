"""The public names, without either extra."""

import inspect

import lorax_hf


def test_tracebacks_and_reprs_show_the_public_module():
    for name in lorax_hf.__all__:
        value = getattr(lorax_hf, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == "lorax_hf", name
