"""The public names: `__all__`, docstrings with examples, and the module that they show."""

import importlib.metadata
import inspect

import lorax
from lorax import bases, kinds, rules, testing


def public(module):
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


def test_all_lists_exactly_the_public_names():
    assert sorted(lorax.__all__) == sorted(public(lorax))


def test_every_public_name_is_documented():
    for name in lorax.__all__:
        value = getattr(lorax, name)
        if callable(value):
            assert value.__doc__ and value.__doc__.strip(), name


def test_functions_have_runnable_examples():
    functions = [getattr(lorax, name) for name in lorax.__all__]
    functions += [testing.check]
    for function in functions:
        if inspect.isfunction(function):
            assert ">>>" in (function.__doc__ or ""), function.__name__


def test_tracebacks_and_reprs_show_the_public_module():
    for name in lorax.__all__:
        value = getattr(lorax, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == "lorax", name


def test_extensions_show_the_public_module():
    for module in (bases, kinds, rules):
        for name in module.__all__:
            value = getattr(module, name)
            assert inspect.isclass(value) or inspect.isfunction(value)
            assert value.__module__ == module.__name__, name


def test_version_is_that_of_the_distribution():
    assert lorax.__version__ == importlib.metadata.version("lorax-core")
