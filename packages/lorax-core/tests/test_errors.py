"""Each error and warning ends with the address of its section in the documentation."""

import pickle
import traceback
import warnings

import pytest

import lorax
from lorax._errors import remedies

OURS = [
    value
    for name in lorax.__all__
    if isinstance(value := getattr(lorax, name), type) and issubclass(value, Exception)
]
ERRORS = [c for c in OURS if issubclass(c, lorax.LoraxError)]
WARNINGS = [c for c in OURS if issubclass(c, lorax.LoraxWarning)]


def test_all_are_one_or_the_other():
    assert {*ERRORS, *WARNINGS} == {*OURS} and ERRORS and WARNINGS


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_ends_with_its_address_in_a_traceback(error: type[Exception]):
    last = "".join(traceback.format_exception(error("`w` is wrong."))).splitlines()[-1]
    assert last == remedies(error)
    assert last.endswith(f"/troubleshooting/#{error.__name__.lower()}")


def test_an_error_that_another_quotes_has_no_address_in_the_middle():
    assert str(lorax.SpecError("`w` is wrong.")) == "`w` is wrong."


def test_a_pickled_error_has_its_address_once():
    error = pickle.loads(pickle.dumps(lorax.PairError("`w` is wrong.")))
    assert error.__notes__ == [remedies(lorax.PairError)]


@pytest.mark.parametrize("category", WARNINGS)
def test_a_warning_ends_with_its_address(category: type[Warning]):
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


def test_a_class_of_somebody_else_has_the_address_of_ours():
    class MyError(lorax.SpecError):
        pass

    assert MyError("no").__notes__ == [remedies(lorax.SpecError)]
