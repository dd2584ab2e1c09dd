"""Multinomial naive Bayes over words: a baseline on the same sentences without a language model."""

import collections
import math
import re


def fit_bayes(reviews):
    """Return a function from a text to the log odds that it is positive (add-one smoothing)."""
    counts = {True: collections.Counter(), False: collections.Counter()}
    for review in reviews:
        counts[review.positive].update(_words(review.text))
    vocabulary = counts[True].keys() | counts[False].keys()
    total = {side: counts[side].total() + len(vocabulary) for side in counts}
    share = sum(review.positive for review in reviews) / len(reviews)

    def log_odds(text):
        odds = math.log(share / (1 - share))
        for word in _words(text):
            if word in vocabulary:
                odds += math.log((counts[True][word] + 1) / total[True])
                odds -= math.log((counts[False][word] + 1) / total[False])
        return odds

    return log_odds


def _words(text):
    return re.findall(r"[a-z']+", text.lower())
