"""Makes the golden LLaVA files in the names that each generation of transformers gives its own model.

    python make_layouts_llava_names.py --out DIR

Reads DIR/llava15_official/truth (the legacy names, L1) with the transformers that runs it and writes what its model
calls the same tensors: 4.52 to 5.5 give L2 (run it with 4.57.1), 5.6 and later L3 and, when a model that was built from a
config is saved, L4 (run it with 5.23.0). The truth is L1 with the same values.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import tempfile

import torch
from layouts import all_distinct, contiguous, fresh, same_bits, versions, write_case
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration


def write(out: pathlib.Path, name: str, function: str, state: dict[str, torch.Tensor], notes: list[str]) -> None:
    truth = out / "llava15_official" / "truth"
    legacy = load_file(truth / "model.safetensors")
    by_bytes = {tensor.numpy().tobytes(): key for key, tensor in legacy.items()}
    if len(by_bytes) != len(legacy):
        raise SystemExit("two tensors of the truth are equal")
    same_bits({by_bytes[tensor.numpy().tobytes()]: tensor for tensor in state.values()}, legacy)
    case = fresh(out, name)
    all_distinct(state)
    save_file(state, case / "source" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(truth / "config.json", case / "source")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(truth / file, case / "truth")
    examples = sorted(key for key in state if "layers.0" not in key and "layers.1" not in key)
    write_case(
        case, tool="transformers", made_with=versions("transformers", "safetensors"), function=function,
        entry="", forward=True, backward=True,
        checks={"values": "bit-equal to llava15_official/truth"},
        sizes=json.loads((out / "llava15_official" / "case.json").read_text())["sizes"],
        notes=[*notes, "some names: " + ", ".join([examples[0], examples[-1]])],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    out = parser.parse_args().out
    truth = out / "llava15_official" / "truth"
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        truth, torch_dtype=torch.float16, output_loading_info=True
    )
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise SystemExit(f"{loading}")
    state = contiguous(model.state_dict())
    major, minor = (int(part) for part in versions("transformers")["transformers"].split(".")[:2])
    runtime = "LlavaForConditionalGeneration.state_dict() after from_pretrained of the truth"
    if (major, minor) >= (5, 6):
        write(out, "llava_names_l3", runtime, state, ["names of transformers 5.6 and later in memory"])
        built = LlavaForConditionalGeneration(model.config).half()
        built.load_state_dict(model.state_dict(), strict=True)
        with tempfile.TemporaryDirectory() as scratch:
            built.save_pretrained(scratch)
            saved = load_file(pathlib.Path(scratch) / "model.safetensors")
        function = "save_pretrained of a LlavaForConditionalGeneration that was built from a config"
        write(out, "llava_names_l4", function, saved, ["legacy names, but without the level vision_model"])
    elif (major, minor) >= (4, 52):
        write(out, "llava_names_l2", runtime, state, ["names of transformers 4.52 to 5.5 in memory"])
    else:
        same_bits(state, load_file(truth / "model.safetensors"))
        print("the names in memory are those of the truth")


if __name__ == "__main__":
    main()
