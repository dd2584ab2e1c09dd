"""Each error and warning ends with the address of its section in the documentation."""

import pickle
import traceback
import warnings

import pytest

import lorax
from lorax._errors import remedies

EXCEPTIONS = [
    value
    for name in lorax.__all__
    if isinstance(value := getattr(lorax, name), type) and issubclass(value, Exception)
]
ERRORS = [c for c in EXCEPTIONS if issubclass(c, lorax.LoraxError)]
WARNINGS = [c for c in EXCEPTIONS if issubclass(c, lorax.LoraxWarning)]


def test_every_exception_is_an_error_or_a_warning():
    assert {*ERRORS, *WARNINGS} == {*EXCEPTIONS} and ERRORS and WARNINGS


@pytest.mark.parametrize("error", ERRORS)
def test_error_ends_with_its_address_in_a_traceback(error: type[Exception]):
    last_line = "".join(traceback.format_exception(error("`w` is wrong."))).splitlines()[-1]
    assert last_line == remedies(error)
    assert last_line.endswith(f"/troubleshooting/#{error.__name__.lower()}")


def test_str_of_an_error_has_no_address():
    assert str(lorax.SpecError("`w` is wrong.")) == "`w` is wrong."


def test_pickled_error_has_its_address_once():
    error = pickle.loads(pickle.dumps(lorax.PairError("`w` is wrong.")))
    assert error.__notes__ == [remedies(lorax.PairError)]


@pytest.mark.parametrize("category", WARNINGS)
def test_warning_ends_with_its_address(category: type[Warning]):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("`w` is odd.", category, stacklevel=1)
    shown = warnings.formatwarning(
        caught[0].message, category, caught[0].filename, caught[0].lineno, line=""
    )
    assert f"{category.__name__}: `w` is odd.\n{remedies(category)}\n" in shown


def test_filters_match_the_text_of_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`w` is odd.$", lorax.RankWarning)
        warnings.warn("`w` is odd.", lorax.RankWarning, stacklevel=1)


def test_subclass_has_the_address_of_its_base_class():
    class MyError(lorax.SpecError):
        pass

    assert MyError("no").__notes__ == [remedies(lorax.SpecError)]
