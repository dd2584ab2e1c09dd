import inspect

import lorax_io


def test_tracebacks_and_reprs_show_the_public_module():
    for name in lorax_io.__all__:
        value = getattr(lorax_io, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == "lorax_io", name


def test_every_public_function_has_an_example():
    for name in lorax_io.__all__:
        value = getattr(lorax_io, name)
        if inspect.isfunction(value):
            assert "Example:" in (value.__doc__ or ""), name
