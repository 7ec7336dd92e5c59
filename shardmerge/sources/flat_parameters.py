"""FSDP1's flat parameters: all weights of a module in one row, and nothing that says which is where.

``torch/distributed/fsdp/_state_dict_utils.py``, ``_local_post_state_dict_hook``: LOCAL_STATE_DICT saves the rank's part
of each module's ``_flat_param`` as it is. Names, shapes and order are known to the running model alone. torch 1.11 and
fairscale called it ``flat_param``, with a number.
"""

from __future__ import annotations

import re

from shardmerge.errors import CheckpointError

_FLAT = re.compile(r"(?:.*\.)?_?flat_param(?:_\d+)?", re.DOTALL)


def check_named(name: str, file: str) -> None:
    """Raises ``flat-parameters`` where a tensor's name is that of a flat parameter."""
    if "flat_param" in name and _FLAT.fullmatch(name):
        raise CheckpointError(
            "flat-parameters",
            "this is a LOCAL_STATE_DICT of FSDP: the weights of each module lie in one row, and neither their names nor"
            " their shapes are in the file",
            where=f"{file}, {name[:200]}" if file else name[:200],
            hint="load it in the run that wrote it, and save it there once more with StateDictType.FULL_STATE_DICT or"
            " SHARDED_STATE_DICT",
        )
