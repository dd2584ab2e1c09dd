"""The byte-level BPE tokenizer of a GGUF file."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def load_tokenizer(reader):
    """Build the tokenizer from an open `gguf.GGUFReader`. It does not add special tokens."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    return build_tokenizer(tokens, merges)


def build_tokenizer(tokens, merges):
    """Build from the tokens in order of their ids, and the merges ("left right") in order of rank.

    As in the model's training, each digit is a token: "1984" has four.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
