"""The job of finetune.py once more, with the Llama of transformers 5 in place of ours.

transformers reads the same file into its PyTorch module, which `lorax_hf.from_torch` runs in JAX.
Both models are taught with the same sentences and seeds, and scored in one table. PEFT then loads
the adapter into the PyTorch module, whose logits are compared with those of JAX.
"""

import sys

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
from metrics import difference


class NextToken(transformers.LlamaForCausalLM):
    """The logits of the token after position `last` alone, as a call of this module."""

    def forward(self, tokens, last):
        """From `tokens` [batch, time] and `last` [batch] to logits [batch, vocabulary]."""
        x = self.model(tokens).last_hidden_state
        return self.lm_head(x[torch.arange(len(last)), last])


def main(arguments=None):
    """Run both jobs; the exit code is 1 where a download or a check fails."""
    args = parse_args(__doc__, arguments, out="finetune-torch-output", steps=60)
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
    in_peft = difference(peft_logits(module, theirs.folder, theirs.batch), theirs.logits)

    scores = {"before": ours.before, "after": ours.after}
    scores |= {"transformers before": theirs.before, "transformers after": theirs.after}
    show_scores(job.title, scores | {"naive Bayes": job.naive_bayes()})
    for model, parts in seconds.items():
        show_seconds(parts, f"Wall time, {model}")
    checks = {"reloaded": theirs.reloaded, "merged": theirs.merged, "in PEFT on PyTorch": in_peft}
    agree = show_adapter(theirs.folder, "logits", checks, theirs.base, TOLERANCE)
    return 0 if agree else 1


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


def peft_logits(module, folder, batch):
    """What the module in PyTorch returns with the adapter that PEFT loads."""
    adapted = peft.PeftModel.from_pretrained(module, folder).eval()
    tokens, last = (torch.from_numpy(np.array(array)) for array in batch)
    with torch.no_grad():
        return adapted.base_model.model(tokens, last).numpy()


if __name__ == "__main__":
    sys.exit(main())
