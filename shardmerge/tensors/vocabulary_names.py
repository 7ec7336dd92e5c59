"""How transformers calls what has a row for each token of a vocabulary, by the ends of names."""

from __future__ import annotations

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "lm_head.bias")
OVER_VOCABULARY = (*EMBEDDINGS, *HEADS)


def is_embedding(module: str) -> bool:
    """Whether a module, without its ``.weight``, is an embedding."""
    return f"{module.rpartition('.')[2]}.weight" in EMBEDDINGS
