"""Loads a mapping into a transformers model: python load_model.py MAPPING CONFIG_DIRECTORY."""

import sys

import transformers

import shardmerge

mapping, folder = sys.argv[1:3]
config = transformers.AutoConfig.from_pretrained(folder)
kind = getattr(transformers, config.architectures[0])  # the class itself: AutoModel rejects None
state = shardmerge.open_checkpoint(mapping).torch()
model = kind.from_pretrained(None, config=config, state_dict=state, dtype="auto")
print(type(model).__name__, model.dtype, sum(p.numel() for p in model.parameters()), "parameters")
