"""Scores a model, trains an adapter, scores it again, saves it and checks the saved file."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from bayes import fit_bayes
from data import (
    CALIBRATION,
    NEGATIVE,
    POSITIVE,
    batches,
    choose,
    encode,
    labels,
    read_reviews,
    token_of,
)
from display import console, plot_curve, timed
from lorax import QuantizedWeight, count_params, dequantize, init_lora, lora, merge_params
from lorax_io import load_peft, save_peft
from metrics import difference, score
from training import TRAIN_BATCH, predict, train

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the base model in the adapter's config
TOLERANCE = 1e-4  # between the forms of the adapter, relative to the largest logit


class Subject(NamedTuple):
    """A model to fine-tune."""

    params: Any
    model: Any  # model(params, tokens, last): the logits of the token after position `last`
    spec: Any
    names: Any  # the PyTorch name of each parameter
    form: str = "float32"  # format of the parameters


class Result(NamedTuple):
    """The results of fine-tuning."""

    before: Any
    after: Any
    folder: Any  # the saved adapter
    batch: Any  # `tokens` and `last`
    logits: Any  # of the trained model on `batch`
    reloaded: float  # differences from `logits`
    merged: float
    base: float


class Job:
    """The sentences for training and evaluation, the same for every model."""

    def __init__(self, args, sentences, tokenizer):
        self.args = args
        self.prompts_of = functools.partial(encode, tokenizer=tokenizer)
        self.positive, self.negative = token_of(POSITIVE, tokenizer), token_of(NEGATIVE, tokenizer)
        self.reviews = read_reviews(sentences)
        size = args.steps * TRAIN_BATCH
        self.training, calibration, held_out = choose(
            self.reviews, self.prompts_of, size, args.seed
        )
        self.evaluation = held_out[: args.limit_eval] + calibration

    @property
    def title(self):
        """The title of the table of scores."""
        return f"On {len(self.evaluation) - CALIBRATION} held-out sentences"

    def naive_bayes(self):
        """The scores of naive Bayes on the same sentences."""
        classify = fit_bayes(self.training)
        baseline = np.array([classify(review.text) for review in self.evaluation])
        return score(baseline, labels(self.evaluation), CALIBRATION)

    def fine_tune(self, subject, out, seconds):
        """Train an adapter for a model, and save it in the folder `out`."""
        params, model, spec, names, form = subject
        suffix = "" if form == "float32" else f", {form}"
        frozen, tunable = init_lora(params, spec, jax.random.key(self.args.seed))
        adapted = lora(model)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params, is_leaf=is_quantized))
        console.print(f"Base: {count_params(params):,} parameters, {form}, {size / 1e6:.0f} MB")
        console.print(f"Adapter on every q_proj and v_proj: {count_params(tunable):,} parameters")

        @jax.jit
        def margin(tunable, frozen, tokens, last):
            logits = adapted((frozen, tunable), tokens, last)
            return logits[:, self.positive] - logits[:, self.negative]

        def evaluate(tunable, label):
            with timed(seconds, f"{label.lower()}{suffix}"):
                prompts = self.prompts_of(self.evaluation)
                margins = predict(margin, tunable, frozen, prompts, label)
            return score(margins, labels(self.evaluation), CALIBRATION)

        # b is initially zero, so the adapted model is bit-identical to the base model.
        before = evaluate(tunable, "Evaluate before")
        with timed(seconds, f"train{suffix}"):
            prompts, positives = self.prompts_of(self.training), labels(self.training)
            tunable, curve = train(
                margin,
                tunable,
                frozen,
                prompts,
                positives,
                self.args.learning_rate,
                self.args.seed,
            )
        after = evaluate(tunable, "Evaluate after")

        with (
            timed(seconds, f"save and check{suffix}"),
            console.status("Saving and checking the adapter"),
        ):
            out.mkdir(parents=True, exist_ok=True)
            held_out = {"before": before.accuracy, "after": after.accuracy}
            plot_curve(curve, self.args.plot or out / "curve.svg", held_out)
            folder = out / "adapter"
            save_peft(folder, tunable, names, base_model=BASE, task_type="CAUSAL_LM")
            _, *batch = batches(self.prompts_of(self.evaluation[:TRAIN_BATCH]), TRAIN_BATCH)[0]
            forms = forms_of(subject, (frozen, tunable), folder, batch)
        return Result(before, after, folder, batch, *forms)


def forms_of(subject, pair, folder, batch):
    """The logits of a pair, and the differences of the adapter's other forms and of the base."""
    model, adapted = jax.jit(subject.model), jax.jit(lora(subject.model))
    logits = adapted(pair, *batch)
    reloaded = adapted(load_peft(folder, subject.params, subject.names), *batch)
    merged = model(merge_params(*pair), *batch)
    base = model(dequantize(subject.params), *batch)
    return logits, *(difference(form, logits) for form in (reloaded, merged, base))


def is_quantized(node):
    """Whether a node of a tree is a quantized weight."""
    return isinstance(node, QuantizedWeight)
