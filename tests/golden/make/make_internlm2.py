"""Makes tests/golden/architectures/internlm2.json: what the remote code of InternLM2 saves for tiny configs.

No version of transformers has InternLM2. Its code (modeling_internlm2.py, configuration_internlm2.py, the same files as
beside the weights of internlm/internlm2-*) is in XTuner 0.2.0's wheel, under xtuner/_lite/modelings/internlm2. Unpack
that folder and give its parent; transformers 4.51.3 and einops have to be there:

    python make_internlm2.py --code FOLDER_OF_internlm2 --out tests/golden/architectures/internlm2.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3,
}  # fmt: skip
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("InternLM2ForCausalLM", TEXT),
    ("InternLM2ForCausalLM", TEXT | {"bias": False, "num_key_value_heads": None}),
    ("InternLM2ForCausalLM", TEXT | {"tie_word_embeddings": True}),
    ("InternLM2Model", TEXT),
    ("InternLM2ForSequenceClassification", TEXT | {"num_labels": 4}),
    ("InternLM2ForTokenClassification", TEXT | {"num_labels": 4}),
)


def saved(module: Any, config_class: Any, kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns what the directory of a saved model holds."""
    from safetensors import safe_open

    model = getattr(module, kind)(config_class(**sizes))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder, "model.safetensors"), "pt") as file:
            tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}
        return {"config": json.loads(Path(folder, "config.json").read_text()), "files": tensors}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--code", required=True)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.code)
    import internlm2.modeling_internlm2 as module
    from internlm2.configuration_internlm2 import InternLM2Config

    found = {
        "cases": [(kind, number, saved(module, InternLM2Config, kind, sizes)) for number, (kind, sizes) in enumerate(CASES)],
        "defaults": {"internlm2": InternLM2Config().to_dict()},
    }
    arguments.out.write_text(json.dumps(found, indent=None, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
