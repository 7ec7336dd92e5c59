"""Loads a model with transformers and says which keys were missing, unexpected or mismatched.

A script of its own, for a child process: it needs transformers and torch and nothing of shardmerge, so it runs in any
environment, and their memory never counts in a conversion.

    python load_check.py DIRECTORY       loads a finished directory; prints one line of JSON
    python load_check.py < plan.json     the same for {"config": {...}, "tensors": {name: [dtype, [size, ...]]}}

A plan has no values yet: its tensors are on the meta device, which holds names, types and shapes, and so is the model.
It is ``from_pretrained`` itself that renames, merges and ties them, so its answer is what a user of it will see.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check(path: str) -> dict[str, object]:
    """Returns the class that loads a directory, the versions, and the three lists of keys."""
    _quiet()
    kind = _class(_config(path))
    _, info = kind.from_pretrained(path, output_loading_info=True, low_cpu_mem_usage=True)
    return _found(kind, info)


def check_plan(config: Mapping[str, object], tensors: Mapping[str, tuple[str, list[int]]]) -> dict[str, object]:
    """Returns the same for a directory that is not written yet.

    Parameters
    ----------
    config
        What its config.json will hold.
    tensors
        Of each name in its files the torch dtype and the shape.
    """
    import torch  # noqa: PLC0415

    _quiet()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), "utf-8")
        made = _config(folder)
    kind = _class(made)
    # A type that this torch does not know yet has one byte, and its size is all the same here.
    state = {
        name: torch.empty(shape, dtype=getattr(torch, dtype, torch.uint8), device="meta")
        for name, (dtype, shape) in tensors.items()
    }
    _, info = kind.from_pretrained(
        None,
        config=made,
        state_dict=state,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # lists them all instead of raising
    )
    return _found(kind, info)


def _quiet() -> None:
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _config(path: str) -> Any:  # noqa: ANN401  # transformers has no types here
    import transformers  # noqa: PLC0415

    return transformers.AutoConfig.from_pretrained(path)


def _class(config: Any) -> Any:  # noqa: ANN401
    import transformers  # noqa: PLC0415

    return getattr(transformers, (config.architectures or ["AutoModel"])[0])


def _found(kind: Any, info: Mapping[str, Any]) -> dict[str, object]:  # noqa: ANN401
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    return {
        "class": kind.__name__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(_mismatch, info["mismatched_keys"])),
    }


def _mismatch(key: Any) -> str:  # noqa: ANN401
    """Returns a mismatched key with the shape found and the one that the model has, where they are told."""
    name, *shapes = (key,) if isinstance(key, str) else key
    return f"{name} {' for '.join(str(list(shape)) for shape in shapes)}".rstrip()


if __name__ == "__main__":
    given = json.load(sys.stdin) if len(sys.argv) == 1 else {}
    answer = check_plan(given["config"], given["tensors"]) if given else check(sys.argv[1])
    print(json.dumps(answer))  # noqa: T201  # its answer
