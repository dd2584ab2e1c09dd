"""Ends of names of modules that mean the same in every architecture."""

# Tables of tokens, of which every model has one.
TOKEN_TABLES = ("word_embeddings", "embed_tokens", "shared", "wte", "token_embedding")

# What makes the outputs of a task, which "all-linear" leaves out, as PEFT does.
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
