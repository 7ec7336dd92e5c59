"""Writes a model anew the usual way: load it with transformers, save it."""

from __future__ import annotations

import sys
import warnings

import torch
from transformers import AutoModelForCausalLM


def main(source: str, out: str) -> None:
    """Writes the model in bf16 to the directory ``out``."""
    warnings.simplefilter("ignore")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
