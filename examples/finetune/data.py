"""Movie-review sentences with a human rating, as prompts of a few fixed lengths."""

import itertools
import random
from typing import NamedTuple

import numpy as np

PROMPT = "Review: {}\nSentiment:"  # the model should continue with one of the next two
POSITIVE, NEGATIVE = " positive", " negative"

LENGTHS = (24, 32, 40, 52, 76)  # in tokens; each is compiled once

HELD_OUT = 1000
CALIBRATION = 160  # further sentences, which determine a threshold


class Review(NamedTuple):
    """A sentence, and whether its readers found it favorable."""

    text: str
    positive: bool


def read_reviews(path, least=0.5):
    """The sentences whose mean rating, from -4 to 4, is at least `least` away from zero."""
    reviews = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            _, rating, text = line.rstrip("\n").split("\t")
            if abs(float(rating)) >= least:
                reviews.append(Review(text, float(rating) > 0))
    return reviews


def split(reviews, *sizes, seed):
    """Disjoint random samples of the given sizes, and the rest."""
    shuffled = list(reviews)
    random.Random(seed).shuffle(shuffled)
    edges = [0, *itertools.accumulate(sizes), len(shuffled)]
    return [shuffled[start:end] for start, end in itertools.pairwise(edges)]


def choose(reviews, encode, size, seed):
    """`size` sentences for training, some for fitting a threshold, and some for evaluation.

    Those for evaluation are the same for every seed. `encode` returns token ids for a list of
    reviews.
    """
    held_out, pool = split(reviews, HELD_OUT, seed=0)
    # A step keeps activations of every token in every layer, including padding. The few longest
    # sentences would determine the memory of the whole run, so they are only used for evaluation.
    prompts = encode(pool)
    pool = [review for review, ids in zip(pool, prompts, strict=True) if len(ids) <= LENGTHS[-2]]
    training, calibration, _ = split(pool, size, CALIBRATION, seed=seed)
    return training, calibration, held_out


def labels(reviews):
    """Whether each is positive, as an array."""
    return np.array([review.positive for review in reviews])


def encode(reviews, tokenizer, prompt=PROMPT):
    """Token ids of the prompt of every review."""
    return [tokenizer.encode(prompt.format(review.text)).ids for review in reviews]


def token_of(word, tokenizer):
    """The id of a word that is a single token."""
    (token,) = tokenizer.encode(word).ids
    return token


def batches(prompts, size):
    """Batches of prompts with similar lengths: a list of (rows, tokens [size, time], last [size]).

    `rows` are the indices of the prompts, and `last` the position of each prompt's last token.
    Padding is on the right. The last batch is padded to the same number of rows, so that its shape
    is not new.
    """
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    return [_pad(prompts, by_length[i : i + size], size) for i in range(0, len(prompts), size)]


def _pad(prompts, rows, size):
    longest = max(len(prompts[row]) for row in rows)
    time = next((length for length in LENGTHS if length >= longest), longest)
    tokens, last = np.zeros((size, time), np.int32), np.zeros(size, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(prompts[row])] = prompts[row]
        last[i] = len(prompts[row]) - 1
    return np.array(rows), tokens, last
