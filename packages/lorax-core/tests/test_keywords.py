"""A keyword that is both an option of a function of Lorax and of the user's function raises."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lorax import explain, init_lora, testing
from lorax._keywords import refuses_ambiguous_keywords

PARAMS, X = {"w": jnp.ones((5, 7)) / 5}, jnp.ones((3, 5))


@refuses_ambiguous_keywords
def call_with_options(fn, params, *args, rank, seed=0, **kwargs):
    return fn(params, *args, **kwargs), rank, seed


def takes_rank_by_keyword(params, x, rank=3):
    return rank


def takes_rank_by_position(params, rank, /):
    return rank


def test_option_that_is_also_a_keyword_of_the_function_raises():
    with pytest.raises(
        TypeError, match="`rank` is an option of call_with_options and a keyword of"
    ):
        call_with_options(takes_rank_by_keyword, PARAMS, X, rank=4)


@pytest.mark.parametrize(
    "fn, expected",
    [
        (functools.partial(takes_rank_by_keyword, rank=9), (9, 4, 0)),
        (functools.partial(functools.partial(takes_rank_by_keyword, rank=9)), (9, 4, 0)),
        (lambda params, x: takes_rank_by_keyword(params, x, rank=9), (9, 4, 0)),
        (lambda params, x, **kwargs: kwargs, ({}, 4, 0)),
        (lambda params, x, seed=1: seed, (1, 4, 0)),  # not given, so not ambiguous
    ],
    ids=["partial", "nested", "lambda", "kwargs", "not-given"],
)
def test_bound_keywords_pass(fn, expected):
    assert call_with_options(fn, PARAMS, X, rank=4) == expected


def test_partial_of_another_keyword_raises():
    with pytest.raises(TypeError, match=r"functools.partial\(fn, rank=\.\.\.\)"):
        call_with_options(functools.partial(takes_rank_by_keyword, x=X), PARAMS, rank=4)


def test_positional_parameter_is_not_a_keyword():
    assert call_with_options(takes_rank_by_position, PARAMS, X, rank=4)[1] == 4


def test_callable_objects_and_builtins():
    class Model:
        def __call__(self, params, x, *, seed=2):
            return seed

    with pytest.raises(TypeError, match="`seed` is an option"):
        call_with_options(Model(), PARAMS, X, rank=4, seed=5)
    assert call_with_options(max, [1, 2], rank=4) == (2, 4, 0)


def scaled(params, x, *, tolerance=1.0, pair=1.0, fn=1.0, spec=1.0):
    return tolerance * pair * fn * spec * (x @ params["w"])


def test_check_rejects_ambiguous_keywords():
    with pytest.raises(TypeError, match="`tolerance` is an option of check"):
        testing.check(scaled, PARAMS, {"w": 2}, X, tolerance=1e-3)
    fn = functools.partial(scaled, tolerance=2.0)
    testing.check(fn, PARAMS, {"w": 2}, X, tolerance=1e-3, transforms=False)


def test_keywords_of_the_model_may_be_named_like_positional_parameters():
    testing.check(scaled, PARAMS, {"w": 2}, X, transforms=False, pair=2.0, fn=0.5, spec=3.0)
    pair = init_lora(PARAMS, {"w": 2}, jax.random.key(0))
    assert explain(scaled, pair, X, pair=2.0, fn=0.5, spec=3.0).rows[0].uses == ("dot_general",)
