"""Ends of module names that have the same meaning in all architectures."""

# Token embeddings.
TOKEN_TABLES = ("word_embeddings", "embed_tokens", "shared", "wte", "token_embedding")

# The output layers of tasks, which "all-linear" leaves out, as PEFT does.
HEADS = (
    "lm_head",
    "lm_head.decoder",
    "predictions.decoder",
    "generator_lm_head",
    "vocab_projector",
    "classifier",
    "classifier.out_proj",
    "classification_head.out_proj",
    "score",
    "qa_outputs",
)
