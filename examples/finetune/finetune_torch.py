"""The job of finetune.py once more, with the Llama of transformers 5 in place of ours.

transformers reads the same file into its PyTorch module, which `lorax_hf.from_torch` runs in JAX.
Both models are taught with the same sentences and seeds, and scored in one table. PEFT then loads
the adapter into the PyTorch module, whose logits are compared with those of JAX. With `--base nf4`
a second adapter is trained on the same module with its products' weights in 4 bits.
"""

import sys

import jax
import numpy as np
import peft
import torch
import transformers

import lorax_hf
from arguments import parse_args
from display import console, download, show_adapter, show_scores, show_seconds, timed
from download import REVIEWS, WEIGHTS, DownloadError
from finetune import load as load_ours
from job import TOLERANCE, Job, Subject
from lorax import dequantize, quantize
from metrics import difference


class NextToken(transformers.LlamaForCausalLM):
    """The logits of the token after position `last` alone, as a call of this module."""

    def forward(self, tokens, last):
        """From `tokens` [batch, time] and `last` [batch] to logits [batch, vocabulary]."""
        x = self.model(tokens).last_hidden_state
        return self.lm_head(x[torch.arange(len(last)), last])


def main(arguments=None):
    """Run the jobs; the exit code is 1 where a download or a check fails."""
    args = parse_args(
        __doc__, arguments, out="finetune-torch-output", steps=60, bases=["float32", "nf4"]
    )
    try:
        [weights], [sentences] = (download([file], args.cache) for file in (WEIGHTS, REVIEWS))
    except DownloadError as error:
        console.print(f"Error: {error}", markup=False, soft_wrap=True)
        return 1
    seconds = {"our own Llama": {}, "transformers": {}}

    with timed(seconds["our own Llama"], "load"):
        tokenizer, subject = load_ours(weights, args)
    job = Job(args, sentences, tokenizer)
    ours = job.teach(subject, args.out / "ours", seconds["our own Llama"])

    with timed(seconds["transformers"], "load"):
        module = read(weights)
        subject = subject_of(module, args)
    theirs = job.teach(subject, args.out / "transformers", seconds["transformers"])
    checked = [(theirs, peft_logits(module, theirs))]
    scores = {"before": ours.before, "after": ours.after}
    scores |= {"transformers before": theirs.before, "transformers after": theirs.after}

    if args.base != "float32":
        with timed(seconds["transformers"], f"load, {args.base}"):
            subject = in_codes(subject, args.base)
        coded = job.teach(subject, args.out / args.base, seconds["transformers"])
        with_values(module, dequantize(subject.params))
        checked.append((coded, peft_logits(module, coded)))
        scores |= {f"{args.base} before": coded.before, f"{args.base} after": coded.after}

    show_scores(job.title, scores | {"naive Bayes": job.naive_bayes()})
    for model, parts in seconds.items():
        show_seconds(parts, f"Wall time, {model}")
    return 0 if all([agrees(taught, in_peft) for taught, in_peft in checked]) else 1


def read(path):
    """The module of a GGUF file, its weights dequantized."""
    options = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    return NextToken.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=options, dtype=torch.float32
    ).eval()


def subject_of(module, args):
    """A module as the job takes it."""
    model, params = lorax_hf.from_torch(module)
    spec = lorax_hf.spec(
        model, rank=args.rank, alpha=args.alpha, targets=["self_attn.q_proj", "self_attn.v_proj"]
    )
    return Subject(params, model, spec, lorax_hf.peft_names(model))


def in_codes(subject, form):
    """The same with the weights of its products in few bits."""
    row = jax.ShapeDtypeStruct((1,), np.int32)
    args = jax.ShapeDtypeStruct((1, 2), np.int32), row
    coded = quantize(subject.params, form, fn=subject.model, args=args)
    return subject._replace(params=coded, form=form)


def with_values(module, params):
    """Give a module the values of these parameters."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(params[name])))


def peft_logits(module, taught):
    """What the module in PyTorch returns with the adapter that PEFT loads."""
    adapted = peft.PeftModel.from_pretrained(module, taught.folder).eval()
    tokens, last = (torch.from_numpy(np.array(array)) for array in taught.batch)
    with torch.no_grad():
        logits = adapted.base_model.model(tokens, last).numpy()
    adapted.unload()  # PEFT has put its layers into the module.
    return logits


def agrees(taught, in_peft):
    """Show an adapter; whether all of its forms give the logits of training."""
    checks = {"reloaded": taught.reloaded, "merged": taught.merged}
    checks["in PEFT on PyTorch"] = difference(in_peft, taught.logits)
    return show_adapter(taught.folder, "logits", checks, taught.base, TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
