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
import logging
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def check(path: str) -> dict[str, object]:
    """Returns the class that loads a directory, the versions, and the three lists of keys."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    kind = _class(_class_name(config.architectures))
    _, info = kind.from_pretrained(path, output_loading_info=True, low_cpu_mem_usage=True)
    return _found(kind, info)


def check_plan(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]]) -> dict[str, object]:
    """Returns the same for a directory that is not written yet; only ``own_code`` if its class is not the library's.

    Parameters
    ----------
    config
        What its config.json will hold.
    tensors
        Of each name in its files the torch dtype and the shape.
    """
    import accelerate  # noqa: F401  # without it `from_pretrained` places no model on a device that is named
    import torch
    import transformers

    name = _class_name(config.get("architectures"))
    if "auto_map" in config and not (config.get("model_type") in transformers.CONFIG_MAPPING and _has(name)):
        return {"own_code": name}
    made = _config(config)
    # A type that this torch does not know yet has one byte, and its size is all the same here.
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype, torch.uint8), device="meta")
        for key, (dtype, shape) in tensors.items()
    }
    _, info = _class(name).from_pretrained(
        None,
        config=made,
        state_dict=state,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # lists them all instead of raising
    )
    return _found(_class(name), info)


def _config(values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Returns the config object that the library reads from a config.json of these values."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(values), "utf-8")
        try:
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, "config.json")) from error


def _class_name(architectures: Any) -> str:  # noqa: ANN401  # whatever the file says
    stated = architectures[0] if isinstance(architectures, list) and architectures else None
    return stated if isinstance(stated, str) else "AutoModel"


def _has(name: str) -> bool:
    import transformers

    return hasattr(getattr(transformers, name, None), "from_pretrained")


def _class(name: str) -> Any:  # noqa: ANN401  # transformers has no types here
    import transformers

    if not _has(name):
        raise ValueError(f"transformers {transformers.__version__} has no class {name}")
    return getattr(transformers, name)


def _found(kind: Any, info: Mapping[str, Any]) -> dict[str, object]:  # noqa: ANN401
    import torch
    import transformers

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


class _Report(logging.Handler):
    """Keeps what transformers logs of conversions that failed: the exception itself only points there."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        lines = _ESCAPES.sub("", record.getMessage()).splitlines()
        self.errors += [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]


def answer(path: str, given: str) -> dict[str, object]:
    """Returns what there is to say of a directory, or of a plan that is given as JSON: the keys, or why there are none.

    Returns
    -------
    dict
        As ``check``; or ``lacks``: a ``package`` is not there; ``no_meta``: loading this class looks at values;
        ``failed``: why transformers cannot load it.
    """
    report = _Report()
    try:
        import torch  # noqa: F401
        import transformers

        transformers.logging.set_verbosity_warning()
        transformers.logging.disable_default_handler()
        transformers.logging.add_handler(report)
        transformers.logging.disable_progress_bar()
        return check(path) if path else check_plan(**json.loads(given))
    except ImportError as error:
        return {"lacks": _first(error), "package": error.name}
    except NotImplementedError as error:
        return {"no_meta" if "meta" in str(error) else "failed": _first(error)}
    except Exception as error:  # noqa: BLE001  # whatever a model's code raises is the answer
        return {"failed": "; ".join([f"{type(error).__name__}: {_first(error)}", *report.errors[:3]])}
    finally:
        logging.getLogger("transformers").removeHandler(report)


def _first(error: Exception) -> str:
    """Returns the beginning of a message: those of transformers go on with advice for its own users."""
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    directory = sys.argv[1] if len(sys.argv) > 1 else ""
    print(json.dumps(answer(directory, "" if directory else sys.stdin.read())))  # noqa: T201  # its answer
