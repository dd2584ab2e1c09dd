"""Scores of a classifier, from margins that are larger for positive sentences."""

from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """The scores of one classifier."""

    accuracy: float
    calibrated: float
    auc: float


def score(margins, positive, calibration):
    """Scores on all but the last `calibration` sentences, which determine the calibrated threshold.

    The calibrated accuracy excludes gains that only correct a bias toward one answer.
    """
    threshold = fit_threshold(margins[-calibration:], positive[-calibration:])
    margins, positive = margins[:-calibration], positive[:-calibration]
    return Scores(
        accuracy=accuracy(margins, positive),
        calibrated=accuracy(margins, positive, threshold),
        auc=auc(margins, positive),
    )


def accuracy(margins, positive, threshold=0.0):
    """The share of sentences whose margin is on the correct side of the threshold."""
    return float(np.mean((margins > threshold) == positive))


def fit_threshold(margins, positive):
    """The threshold that as many margins exceed as there are positive sentences.

    The threshold with the best accuracy would depend on the noise of a small sample.
    """
    return np.quantile(margins, 1 - np.mean(positive))


def auc(margins, positive):
    """The probability that a positive sentence has a larger margin than a negative one."""
    differences = margins[positive][:, None] - margins[~positive][None, :]
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def difference(outputs, reference):
    """The largest difference, relative to the largest reference."""
    return float(np.max(np.abs(outputs - reference)) / np.max(np.abs(reference)))
