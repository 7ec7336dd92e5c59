"""Megatron's ``torch_dist`` to Hugging Face without a base: the stored args say what the model is.

That every case is converted bit for bit is in tests/test_layouts.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import shardmerge as sm
from tests.presets_in_use import LAYOUTS, compare_bits, read_tensors

transformers = pytest.importorskip("transformers")

PRESET = "llama/megatron-dist-to-hf"
MOE = f"{PRESET}-qwen3-moe"
# One of each kind that has args: NeMo keeps none.
KINDS = {
    "torch_dist_llama_tp2_pp2": PRESET, "torch_dist_llama_mha": PRESET, "torch_dist_llama_numbered_tp2": PRESET,
    "torch_dist_qwen2_tied_pp2": PRESET, "torch_dist_qwen3_tp2": PRESET, "torch_dist_mixtral_ep2": PRESET,
    "torch_dist_qwen3_moe_ep2": MOE,
}  # fmt: skip
TOKENS = torch.arange(3, 12)[None]
# Fields that tell of the run that wrote the config, or that no argument of Megatron's says.
OWN = dict.fromkeys(("_name_or_path", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "vocab_size"))


def convert(case: str, out: Path, preset: str = PRESET, **more: object) -> Path:
    return sm.convert(LAYOUTS / case / "source", out, use=preset, **more).path


def model(folder: Path) -> torch.nn.Module:
    """The model in float32; fails unless every tensor found its place and no place stayed empty."""
    found, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return found.eval()


@pytest.mark.parametrize("case", KINDS)
def test_the_args_describe_the_model(case: str, tmp_path: Path) -> None:
    """The padding of the vocabulary is all that differs: no argument says how many tokens there are."""
    made, truth = model(convert(case, tmp_path / "out", KINDS[case])), model(LAYOUTS / case / "truth")
    assert made.config.to_dict() | OWN == truth.config.to_dict() | OWN
    with torch.no_grad():
        ours, theirs = (one(TOKENS).logits for one in (made, truth))
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, atol=1e-6, rtol=0)


def test_args_that_say_how_many_tokens_there_are(tmp_path: Path) -> None:
    case = "torch_dist_llama_numbered_tp2"
    compare_bits(read_tensors(convert(case, tmp_path / "out")), read_tensors(LAYOUTS / case / "truth"))


def test_nemo_keeps_no_args(tmp_path: Path) -> None:
    with pytest.raises(sm.ShardmergeError) as caught:
        convert("torch_dist_nemo2_tied", tmp_path / "out")
    assert "missing-source" in {error.code for error in caught.value.each()}
    made = convert(
        "torch_dist_nemo2_tied", tmp_path / "out", bases={"base": str(LAYOUTS / "torch_dist_nemo2_tied/truth")}
    )
    assert model(made).config.tie_word_embeddings


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_no_part_of_a_stack(layers: int, tmp_path: Path) -> None:
    case = "torch_dist_llama_tp2_pp2"
    shutil.copytree(LAYOUTS / case / "truth", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(sm.ShardmergeError) as caught:
        convert(case, tmp_path / "out", bases={"base": str(tmp_path / "base")}, let={"layers": str(layers)})
    stacked = [error for error in caught.value.each() if error.code == "op-shape"]
    assert stacked
    assert all("another number is stacked" in error.what for error in stacked)


def test_the_names_of_experts_are_those_of_the_family(tmp_path: Path) -> None:
    for case, preset in (("torch_dist_qwen3_moe_ep2", PRESET), ("torch_dist_mixtral_ep2", MOE)):
        with pytest.raises(sm.ShardmergeError) as caught:
            convert(case, tmp_path / "out", preset)
        assert {error.code for error in caught.value.each()} == {"missing-tensor", "unexpected-target"}


def test_a_plan_counts_the_layers_of_a_stack_together(tmp_path: Path) -> None:
    text = _planned("torch_dist_mixtral_ep2", tmp_path)
    (line,) = (line for line in text.splitlines() if line.endswith("  unstacked from 2, unstacked from 4"))
    assert re.search(r" model\.\* +8 ", line)


def _planned(case: str, folder: Path) -> str:
    from click.testing import CliRunner

    from shardmerge.cli.main import cli

    arguments = ["convert", str(LAYOUTS / case / "source"), str(folder / "out"), "--use", PRESET, "--dry-run"]
    return CliRunner().invoke(cli, arguments).output
