"""InternVL of transformers back to its authors' layout: against what transformers' conversion script made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import shardmerge as sm
from shardmerge.errors import ShardmergeError
from tests.presets_in_use import LAYOUTS, compare_bits, read_tensors

PRESETS = {"internvl_qwen2": "internvl/hf-to-original", "internvl_internlm2": "internvl/hf-to-original-internlm2"}
OPTIONS = sm.Options(sync=False)


def back(model: Path, original: Path, out: Path, preset: str) -> Path:
    return sm.convert(model, out, use=preset, bases={"original": str(original)}, options=OPTIONS).path


@pytest.mark.parametrize("case", PRESETS)
def test_what_the_script_made_becomes_the_original_again(case: str, tmp_path: Path) -> None:
    """``truth`` is made of ``source`` by the rules of transformers' own script, and loads with nothing missing."""
    source = LAYOUTS / case / "source"
    (source_config := tmp_path / "original").mkdir()
    shutil.copytree(source, source_config, dirs_exist_ok=True)
    (source_config / "modeling_internvl_chat.py").write_text("# their code\n")
    out = back(LAYOUTS / case / "truth", source_config, tmp_path / "out", PRESETS[case])
    compare_bits(read_tensors(out), read_tensors(source))
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (out / "modeling_internvl_chat.py").is_file()


@pytest.mark.parametrize("case", PRESETS)
def test_there_and_back_is_the_same(case: str, tmp_path: Path) -> None:
    source = LAYOUTS / case / "source"
    there = sm.convert(source, tmp_path / "there", use="internvl/original-to-hf", options=OPTIONS).path
    compare_bits(read_tensors(back(there, source, tmp_path / "out", PRESETS[case])), read_tensors(source))


def refused(model: Path, original: Path, out: Path, preset: str = "internvl/hf-to-original") -> list[ShardmergeError]:
    with pytest.raises(ShardmergeError) as caught:
        back(model, original, out, preset)
    assert not out.exists()
    return list(caught.value.each())


def test_the_other_preset_is_refused(tmp_path: Path) -> None:
    case = LAYOUTS / "internvl_internlm2"
    codes = {error.code for error in refused(case / "truth", case / "source", tmp_path / "out")}
    assert codes == {"missing-tensor", "unexpected-target"}


def test_an_original_of_another_size_is_refused(tmp_path: Path) -> None:
    case = LAYOUTS / "internvl_qwen2"
    shutil.copytree(case / "source", tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    config = json.loads(path.read_text())
    config["llm_config"]["rms_norm_eps"] = 0.5
    path.write_text(json.dumps(config))
    (error,) = refused(case / "truth", tmp_path / "original", tmp_path / "out")
    assert error.code == "contradiction"
    assert "rms_norm_eps 0.5" in error.found


def test_another_language_model_is_refused(tmp_path: Path) -> None:
    case = LAYOUTS / "internvl_qwen2"
    (error,) = refused(case / "truth", LAYOUTS / "internvl_internlm2" / "source", tmp_path / "out")
    assert error.code == "contradiction"
    assert "llm_config.model_type" in error.found


def test_an_original_without_weights_is_refused(tmp_path: Path) -> None:
    case = LAYOUTS / "internvl_qwen2"
    (error,) = refused(case / "truth", case / "truth", tmp_path / "out")
    assert error.code == "unsupported-architecture"
