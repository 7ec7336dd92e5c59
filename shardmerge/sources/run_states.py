"""State of a training run that lies in a torch file and is no model, known by what it holds and not by its name.

What holds what: ``torch.optim.Optimizer.state_dict`` (``state``, ``param_groups``; FSDP's has names in ``state``),
DeepSpeed's ``optimizer_state_dict``, ``torch.optim.lr_scheduler`` (``last_epoch`` ...), ``torch.amp.GradScaler``
(``growth_factor`` ...), the random states of transformers (``rng_state.pth``), accelerate (``random_states_0.pkl``) and
Megatron (``rng_state``).
"""

from __future__ import annotations

import re

from shardmerge.dtypes import DTYPES
from shardmerge.sources.pickle_values import PickleValue, TensorRef

_BYTES = DTYPES["U8"]
_OF_GENERATORS = re.compile(r"cpu|cuda|gpu|npu|xpu|mps|hpu|mlu|musa|sdaa|xla|.*(?:rng|random|seed).*", re.IGNORECASE)
# Keys that only these have; the rest of the dict may be anything but a model's.
_KEYS = (
    ("an optimizer's state", {"state", "param_groups"}),
    ("DeepSpeed's optimizer state of one rank", {"optimizer_state_dict", "ds_config"}),
    ("a learning rate scheduler's state", {"last_epoch", "_step_count"}),
    ("a gradient scaler's state", {"scale", "growth_factor", "backoff_factor"}),
)


def run_state(root: PickleValue) -> str:
    """Returns what state of a run a file holds, in words, or ``""`` where it may hold a model."""
    if not isinstance(root, dict):
        return ""
    names = {str(name) for name in root}
    found = next((what for what, keys in _KEYS if keys <= names), "")
    if found:
        return found
    tensors = {str(name): value for name, value in root.items() if isinstance(value, TensorRef)}
    if tensors and all(_is_generator(name, ref) for name, ref in tensors.items()):
        return "the state of random generators"
    return ""


def _is_generator(name: str, ref: TensorRef) -> bool:
    """A generator's state is a row of bytes."""
    return ref.dtype == _BYTES and len(ref.shape) == 1 and _OF_GENERATORS.fullmatch(name) is not None
