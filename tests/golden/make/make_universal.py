"""Makes the golden universal checkpoints: trainings of `make_deepspeed.py`, converted by DeepSpeed's `ds_to_universal`.

    python make_universal.py --out DIR [--only NAME ...] [--list]

The truth is that of the checkpoint before the conversion, which `make_deepspeed.py` checks against the weights in
memory. What the conversion wrote of trained parameters is compared with it; where it differs, the case says so.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from make_deepspeed import BAG, Case, worker
from processes import spawn

CASES = [
    Case("bag_z1_w2_bf16", "bag", 1, 2, groups=2, features=(*BAG, "2 param groups")),
    Case("bag_z2_w3_bf16", "bag", 2, 3, groups=3, features=(*BAG, "3 param groups")),
    Case("bag_z3_w3_bf16", "bag", 3, 3, groups=3, zero={"sub_group_size": 50},
         features=(*BAG, "3 param groups", "sub_group_size 50")),
    Case("tied_z2_w2_fp16", "tied_small", 2, 2, "fp16", features=("tied weights",)),
    Case("tied_z3_w2_bf16", "tied_small", 3, 2, features=("tied weights",)),
    Case("alignment_z2_w3_bf16", "specks", 2, 3, zero={"parameter_alignment": True},
         features=("parameter_alignment", "frozen parameters")),
    Case("vocabulary_z2_w2_bf16", "tied_small", 2, 2, features=("a padded vocabulary of 33 tokens, 29 of them its own", "tied weights"),
         universal_info={"universal_checkpoint_version": 0.4, "original_vocab_size": 29,
                         "vocabulary_parameter_patterns": [r"model\.embed_tokens\.weight"]}),
    Case("exclude_frozen_z3_w2_bf16", "specks", 3, 2, exclude_frozen=True, features=("exclude_frozen_parameters",)),
    Case("round_robin_z2_w3_bf16", "specks", 2, 3, zero={"round_robin_gradients": True},
         features=("round_robin_gradients",), notes="must be refused by name: ds_to_universal mixes the parameters up"),
]  # fmt: skip


def convert(case: Case) -> None:
    """Convert the checkpoint and remove what it was made of."""
    save_dir = pathlib.Path(case.name, "ckpt")
    tag = (save_dir / "latest").read_text().strip()
    to_universal(save_dir, tag)
    record = json.loads(pathlib.Path(case.name, "case.json").read_text())
    record["latest"] = record["tags"] = None
    record["universal"] = f"{tag}_universal"
    if case.universal_info:
        cut_vocabulary(case)
    record["universal_differs"] = differing(case, save_dir / f"{tag}_universal")
    if bool(record["universal_differs"]) != bool(case.zero.get("round_robin_gradients")):
        raise AssertionError(f"{case.name}: {record['universal_differs']}")
    pathlib.Path(case.name, "case.json").write_text(json.dumps(record, indent=1) + "\n")


def cut_vocabulary(case: Case) -> None:
    """Take the padding off the truth, as the converter is told to."""
    from safetensors.torch import load_file, save_file

    path = pathlib.Path(case.name, "truth.safetensors")
    truth, rows = load_file(str(path)), case.universal_info["original_vocab_size"]
    padded = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({n: t[:rows].clone() if n in padded else t for n, t in truth.items()}, str(path))


def to_universal(save_dir: pathlib.Path, tag: str) -> None:
    """Run DeepSpeed's converter as its documentation says, and leave nothing but what it wrote."""
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(save_dir / tag),
         "--output_folder", str(save_dir / f"{tag}_universal"), "--inject_missing_state",
         "--num_extract_workers", "1", "--num_merge_workers", "1"], check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.rmtree(save_dir / tag)
    (save_dir / "latest").unlink()


def differing(case: Case, universal: pathlib.Path) -> list[str]:
    """The trained parameters whose `fp32.pt` is not the truth, bit for bit."""
    import torch
    from safetensors.torch import load_file

    truth = load_file(str(pathlib.Path(case.name, "truth.safetensors")))
    model: dict[str, Any] = torch.load(next(iter(sorted(universal.glob("*_model_states.pt")))), weights_only=False)
    found = []
    for name in [n for group in model["param_shapes"] for n in group]:
        saved = torch.load(universal / "zero" / name / "fp32.pt", weights_only=False)
        value = saved["param"] if isinstance(saved, dict) else saved
        if not torch.equal(value.reshape(truth[name].shape), truth[name]):
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        return worker(given.worker, CASES)
    cases = [case for case in CASES if not given.only or case.name in given.only]
    if given.list:
        print("\n".join(case.name for case in cases))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    script = os.path.abspath(__file__)
    os.chdir(given.out)
    status = 0
    for world in sorted({case.world for case in cases}):
        names = [case.name for case in cases if case.world == world]
        status = spawn(script, ["--out", ".", "--worker", *names], world) or status
    for case in cases:
        convert(case)
    return status


if __name__ == "__main__":
    sys.exit(main())
