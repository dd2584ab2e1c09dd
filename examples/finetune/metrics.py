"""How well margins, the larger the more positive, tell positive sentences from negative ones."""

from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """What there is to say about one classifier."""

    accuracy: float
    calibrated: float
    auc: float


def score(margins, positive, calibration):
    """Scores on all but the last `calibration` sentences, which set the calibrated threshold.

    The calibrated accuracy shows how much of a gain is more than a corrected lean to one answer.
    """
    threshold = fit_threshold(margins[-calibration:], positive[-calibration:])
    margins, positive = margins[:-calibration], positive[:-calibration]
    return Scores(
        accuracy=accuracy(margins, positive),
        calibrated=accuracy(margins, positive, threshold),
        auc=auc(margins, positive),
    )


def accuracy(margins, positive, threshold=0.0):
    """The share of sentences that are positive just where their margin is above the threshold."""
    return float(np.mean((margins > threshold) == positive))


def fit_threshold(margins, positive):
    """The threshold above which there are as many margins as there are positive sentences.

    The threshold of the best accuracy would follow the noise of a small sample.
    """
    return np.quantile(margins, 1 - np.mean(positive))


def auc(margins, positive):
    """The chance that a positive sentence has a larger margin than a negative one."""
    differences = margins[positive][:, None] - margins[~positive][None, :]
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def difference(outputs, reference):
    """The largest difference, relative to the largest reference."""
    return float(np.max(np.abs(outputs - reference)) / np.max(np.abs(reference)))
