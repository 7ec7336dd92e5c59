"""Merges a LoRA the usual way: load the base with transformers, put the adapter on it, merge, save."""

from __future__ import annotations

import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, out: str) -> None:
    """Writes the merged model in bf16 to the directory ``out``."""
    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, safe_serialization=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
