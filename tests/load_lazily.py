"""Loads a mapping into a model with the transformers that runs it: ``python load_lazily.py MAPPING REFERENCE``.

REFERENCE is a directory that holds the config and the same weights. Prints a JSON object: how often each tensor was
read, whether the model is the reference bit for bit, and by how much loading raised the peak of the process's memory.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import transformers

import shardmerge
from shardmerge.lazy import LazyTensor

READS: Counter[str] = Counter()
TYPE = {"torch_dtype" if transformers.__version__.startswith("4.51") else "dtype": torch.bfloat16}


def loaded(config: transformers.PretrainedConfig, state: Mapping[str, torch.Tensor]) -> tuple[torch.nn.Module, Any]:
    """Returns the model, in the types of the state dict, and what transformers says of the keys."""
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **TYPE)


def main(mapping: str, reference: str) -> None:
    transformers.logging.set_verbosity_error()
    read = LazyTensor.torch

    def counted(tensor: LazyTensor) -> torch.Tensor:
        READS[tensor.name] += 1
        return read(tensor)

    LazyTensor.torch = counted  # type: ignore[method-assign, assignment]
    merged = shardmerge.open_checkpoint(mapping)
    config = transformers.AutoConfig.from_pretrained(reference)
    small = transformers.AutoConfig.from_pretrained(
        reference, hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8, head_dim=2
    )
    loaded(small, getattr(transformers, small.architectures[0])(small).state_dict())  # imports what loading imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model, said = loaded(config, merged.torch())
    raised = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    right = getattr(transformers, config.architectures[0]).from_pretrained(reference, **TYPE).state_dict()
    mine = model.state_dict()
    equal = mine.keys() == right.keys() and all(torch.equal(mine[name], right[name]) for name in right)
    answer = {
        "transformers": transformers.__version__,
        "reads": dict(READS),
        "equal": equal,
        "said": {key: sorted(map(str, value)) for key, value in said.items() if value},
        "raised": raised,
        "nbytes": sum(tensor.nbytes for tensor in merged.values()),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
