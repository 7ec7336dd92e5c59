"""The main job on real XTuner runs: the result loads and computes what the model assembled in memory computes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

import shardmerge as sm
from shardmerge.publish.verify import verify_load
from tests.conftest import GOLDEN, read_all, same_values, shardmerge
from tests.load_environments import VERSIONS, interpreter, ready

XTUNER = GOLDEN / "xtuner"
CASES = ("frozen_z2", "frozen_z3", "lora_both", "lora_llm", "pretrain_z2", "single_frozen", "single_trainvit")

pytestmark = pytest.mark.load


def trained(case: str) -> Path:
    """The checkpoint of a golden run: a directory or a file."""
    return XTUNER / case / json.loads((XTUNER / case / "case.json").read_text())["entry"]


def mapping(folder: Path, case: str, **sources: str) -> Path:
    """The mapping of the story, for a golden run."""
    given = {"llm": str(XTUNER / "base_llm"), "vision": str(XTUNER / "base_clip"), **sources}
    lines = "".join(f"  {name}: {path}\n" for name, path in given.items() if path)
    path = folder / "mapping.yaml"
    path.write_text(
        f"shardmerge: 1\nsources:\n  trained: {trained(case)}\n{lines}"
        "output: {path: out, dtype: bfloat16}\nuse: xtuner/llava-to-hf\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case, converted by the command line."""
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        shardmerge("run", mapping(folder, case), "--no-sync", "-q")
        found[case] = folder / "out"
    return found


def environment(version: str) -> Path:
    if not ready(version):
        pytest.skip(f"transformers {version} could not be installed here: `python tests/load_environments.py` says why")
    return interpreter(version)


@pytest.mark.parametrize("version", VERSIONS)
def test_logits_are_those_of_the_model_in_memory(finished: dict[str, Path], version: str) -> None:
    """0 missing, 0 unexpected, 0 mismatched keys, and equal logits on an image and a prompt, to the last bit."""
    script = Path(__file__).with_name("llava_in_memory.py")
    pairs = [part for case in CASES for part in (finished[case], XTUNER / case / "truth.safetensors")]
    command = [environment(version), script, XTUNER / "base_llm", XTUNER / "base_clip", *pairs]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(CASES)
    for case, found in zip(CASES, answers, strict=True):
        assert found["transformers"] == version
        assert (found["missing"], found["unexpected"], found["mismatched"]) == ([], [], []), case
        assert found["equal"], (case, found["difference"])
        assert found["finite"]
        assert found["image_tokens"] == 16  # (28 / 7) ** 2
        assert found["rows"] == 320  # 298 tokens, <image> and <pad>, in steps of 64
        assert found["feature_layer"] == -2


@pytest.mark.parametrize("version", VERSIONS)
def test_verify_load_uses_the_installed_transformers(finished: dict[str, Path], version: str) -> None:
    found = verify_load(finished["frozen_z2"], str(environment(version)))
    assert found.keys.kind == "LlavaForConditionalGeneration"
    assert found.version == version


def test_verify_load_sees_what_is_missing(finished: dict[str, Path], tmp_path: Path) -> None:
    """A directory without its encoder loads with a warning in transformers; here it is an error."""
    from safetensors.torch import save_file

    python = environment(VERSIONS[-1])
    broken = shutil.copytree(finished["frozen_z2"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sm.VerificationError) as caught:
        verify_load(broken, str(python))
    assert caught.value.code == "does-not-load"
    assert "55 missing" in caught.value.found


def test_each_tensor_comes_from_where_the_plan_says(finished: dict[str, Path]) -> None:
    """Trained parts have the checkpoint's bits, frozen parts the base model's; rounded once to bfloat16."""
    out = read_all(sm.inspect(finished["frozen_z2"]))
    truth = load_file(XTUNER / "frozen_z2" / "truth.safetensors")
    for name, tensor in truth.items():
        component, _, rest = name.partition(".")
        if component == "llm":
            found = out[f"language_model.{rest}"][: len(tensor)]
        else:
            number, side = rest.split(".")[1:]
            found = out[f"multi_modal_projector.linear_{1 if number == '0' else 2}.{side}"]
        assert same_values(found, tensor.bfloat16().double().numpy()), name
    base = read_all(sm.inspect(XTUNER / "base_clip"))
    towers = [name for name in out if name.startswith("vision_tower.")]
    assert len(towers) == 55
    for name in towers:
        expected = base[name.removeprefix("vision_tower.")].astype("float32")
        assert same_values(out[name], sm_bfloat16(expected)), name


def sm_bfloat16(array):
    import torch

    return torch.from_numpy(array.copy()).bfloat16().double().numpy()


def test_xtuners_own_converter_agrees_where_it_can(tmp_path: Path) -> None:
    """XTuner converts a run whose encoder was trained; names, shapes and values are the same but for new rows."""
    reference = XTUNER / "single_trainvit" / "to_hf_huggingface.safetensors"
    if not reference.is_file():
        pytest.skip("XTuner's own converter did not run where the golden files were made, see PROVENANCE.md")
    theirs = load_file(reference)
    sm.convert(
        trained("single_trainvit"),
        tmp_path / "out",
        use="xtuner/llava-to-hf",
        bases={"llm": str(XTUNER / "base_llm"), "vision": str(XTUNER / "base_clip")},
    )
    ours = read_all(sm.inspect(tmp_path / "out"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        rows = 298 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(tensor)
        assert same_values(ours[name][:rows], tensor[:rows].double().numpy()), name


def test_sources_left_out_are_found_through_the_training_config(tmp_path: Path) -> None:
    done = shardmerge("plan", mapping(tmp_path, "frozen_z2", llm="", vision=""))
    assert "taken from the training config, which names 'base_clip'" in done.stdout
    assert "55" in done.stdout


def test_a_source_that_cannot_be_found_is_asked_for_by_name(tmp_path: Path) -> None:
    shutil.copytree(XTUNER / "frozen_z2", tmp_path / "run")
    done = shardmerge(
        "convert", tmp_path / "run" / "work_dirs", tmp_path / "out", "--use", "xtuner/llava-to-hf", code=1
    )
    assert "trained with the visual encoder frozen" in done.stderr
    assert "--base vision=base_clip" in done.stderr
    assert "--base llm=base_llm" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_base_without_the_frozen_part_names_the_component(tmp_path: Path) -> None:
    """The encoder's config is there and its tensors are not: the count, the reason and the remedy in one line."""
    from safetensors.torch import save_file

    empty = tmp_path / "clip"
    empty.mkdir()
    shutil.copy(XTUNER / "base_clip" / "config.json", empty)
    save_file({"logit_scale": load_file(XTUNER / "frozen_z2" / "truth.safetensors")["projector.model.0.bias"]},
              empty / "model.safetensors")  # fmt: skip
    done = shardmerge("run", mapping(tmp_path, "frozen_z2", vision=str(empty)), code=1)
    assert "[missing-component]" in done.stderr
    assert "55 tensors of vision_tower.* have no source: the checkpoint was trained with the visual encoder frozen" in (
        done.stderr
    )


def test_a_base_of_another_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    clip = shutil.copytree(XTUNER / "base_clip", tmp_path / "clip")
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 32
    (clip / "config.json").write_text(json.dumps(config))
    done = shardmerge("run", mapping(tmp_path, "frozen_z2", vision=str(clip)), code=1)
    assert "[shape-mismatch]" in done.stderr
    assert "one of another size" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_merge_can_be_used_without_writing_it(finished: dict[str, Path], tmp_path: Path) -> None:
    lazy = sm.open_checkpoint(mapping(tmp_path, "frozen_z2"))
    written = sm.open_checkpoint(finished["frozen_z2"])
    assert set(lazy) == set(written)
    for name in written:
        assert lazy[name].numpy().tobytes() == written[name].numpy().tobytes(), name
    rows = lazy["language_model.model.embed_tokens.weight"]
    assert rows[290:305].tobytes() == written["language_model.model.embed_tokens.weight"].numpy()[290:305].tobytes()
