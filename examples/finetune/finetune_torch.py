"""The program finetune.py, also with the Llama of transformers 5.

transformers reads the same file into its PyTorch module, which `lorax_hf.from_torch` runs in JAX.
Both models are fine-tuned with the same sentences and seeds, and scored in one table. PEFT then
loads the adapter into the PyTorch module, whose logits are compared with those in JAX. With `--base
nf4`, a second adapter is trained on the same module with its weights quantized to 4 bits.
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
    """A Llama that returns only the logits of the token after position `last`."""

    def forward(self, tokens, last):
        """From `tokens` [batch, time] and `last` [batch] to logits [batch, vocabulary]."""
        x = self.model(tokens).last_hidden_state
        return self.lm_head(x[torch.arange(len(last)), last])


def main(arguments=None):
    """Run the program; the exit code is 1 if a download or a check fails."""
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
    own_llama = job.fine_tune(subject, args.out / "ours", seconds["our own Llama"])

    with timed(seconds["transformers"], "load"):
        module = read(weights)
        subject = subject_of(module, args)
    in_transformers = job.fine_tune(subject, args.out / "transformers", seconds["transformers"])
    checked = [(in_transformers, peft_logits(module, in_transformers))]
    scores = {"before": own_llama.before, "after": own_llama.after}
    scores |= {
        "transformers before": in_transformers.before,
        "transformers after": in_transformers.after,
    }

    if args.base != "float32":
        with timed(seconds["transformers"], f"load, {args.base}"):
            subject = quantized(subject, args.base)
        on_quantized = job.fine_tune(subject, args.out / args.base, seconds["transformers"])
        set_parameters(module, dequantize(subject.params))
        checked.append((on_quantized, peft_logits(module, on_quantized)))
        scores |= {
            f"{args.base} before": on_quantized.before,
            f"{args.base} after": on_quantized.after,
        }

    show_scores(job.title, scores | {"naive Bayes": job.naive_bayes()})
    for model, parts in seconds.items():
        show_seconds(parts, f"Wall time, {model}")
    return 0 if all([agrees(result, in_peft) for result, in_peft in checked]) else 1


def read(path):
    """The module in a GGUF file, with dequantized weights."""
    options = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    return NextToken.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=options, dtype=torch.float32
    ).eval()


def subject_of(module, args):
    """The `Subject` of a PyTorch module."""
    model, params = lorax_hf.from_torch(module)
    spec = lorax_hf.spec(
        model, rank=args.rank, alpha=args.alpha, targets=["self_attn.q_proj", "self_attn.v_proj"]
    )
    return Subject(params, model, spec, lorax_hf.peft_names(model))


def quantized(subject, form):
    """The same model with quantized weights."""
    row = jax.ShapeDtypeStruct((1,), np.int32)
    args = jax.ShapeDtypeStruct((1, 2), np.int32), row
    on_quantized = quantize(subject.params, form, fn=subject.model, args=args)
    return subject._replace(params=on_quantized, form=form)


def set_parameters(module, params):
    """Copy parameters into a module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(params[name])))


def peft_logits(module, result):
    """The logits of the PyTorch module with the adapter loaded by PEFT."""
    adapted = peft.PeftModel.from_pretrained(module, result.folder).eval()
    tokens, last = (torch.from_numpy(np.array(array)) for array in result.batch)
    with torch.no_grad():
        logits = adapted.base_model.model(tokens, last).numpy()
    adapted.unload()  # removes PEFT's layers from the module
    return logits


def agrees(result, in_peft):
    """Show an adapter; return whether all of its forms give the same logits as in training."""
    checks = {"reloaded": result.reloaded, "merged": result.merged}
    checks["in PEFT on PyTorch"] = difference(in_peft, result.logits)
    return show_adapter(result.folder, "logits", checks, result.base, TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
