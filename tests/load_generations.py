"""Loads directories with the transformers that runs it, and compares each with the one that it should be.

    python load_generations.py OURS REFERENCE [OURS REFERENCE ...]

Prints a JSON object a line: keys that are missing, unexpected or of another shape, whether logits are equal, and the
values of the config that are not those of the reference, as this version understands both.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import torch
import transformers

# What tells of the file, not of the model.
_ASIDE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash", "architectures")


def values(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a config as dotted keys and values."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= values(value, f"{prefix}{key}.")
        elif key not in _ASIDE:
            found[f"{prefix}{key}"] = value
    return found


def load(folder: pathlib.Path) -> tuple[Any, dict[str, list[str]]]:
    """Returns the model of a directory, and what from_pretrained says."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, said = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return model.float().eval(), {key: sorted(map(str, value)) for key, value in said.items() if value}


def output(model: Any) -> torch.Tensor:
    """Returns what a model makes of a few tokens, or of a picture where it reads none."""
    with torch.no_grad():
        if "Vision" in type(model).__name__:
            size = model.config.image_size
            return model(torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)).last_hidden_state
        return model(input_ids=torch.tensor([[10, 11, 12, 13, 14, 20, 30]])).logits


def main() -> None:
    """Loads and compares all pairs."""
    transformers.logging.set_verbosity_error()
    pairs = list(map(pathlib.Path, sys.argv[1:]))
    for ours, reference in zip(pairs[::2], pairs[1::2], strict=True):
        answer: dict[str, Any] = {"ours": str(ours), "transformers": transformers.__version__}
        try:
            model, said = load(ours)
            right, _ = load(reference)
            here, there = values(model.config.to_dict()), values(right.config.to_dict())
            answer |= {
                "said": said,
                "equal": torch.equal(output(model), output(right)),
                "config": {key: [here.get(key), value] for key, value in there.items() if here.get(key) != value},
            }
        except Exception as error:  # noqa: BLE001  # told with the others
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer, default=str), flush=True)


if __name__ == "__main__":
    main()
