"""`convert --save-mapping`: the mapping that was written for a conversion makes the same plan and the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import shardmerge as sm
from shardmerge import api
from tests.conftest import GOLDEN, shardmerge
from tests.plans_in_use import BASES, case_of
from tests.test_invert_exact import truth

FAST = sm.Options(sync=False)


def zero(name: str) -> Path:
    return GOLDEN / "zero" / name / "ckpt"


def entry(name: str) -> Path:
    """Returns the checkpoint of a golden case, whatever it is called there."""
    folder = GOLDEN / name
    return next(place for place in (folder / "ckpt", folder / "source", folder) if place.exists())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of peft, exported from a training run that does not say its alpha."""
    folder = tmp_path_factory.mktemp("adapter")
    mapping = {
        "shardmerge": 1,
        "sources": {"trained": str(case_of("lora_llm"))},
        "output": str(folder / "out"),
        "use": "peft/export",
        "target": {"name": "peft/adapter", "trained": "trained", "alpha": "8"},
    }
    (folder / "m.yaml").write_text(json.dumps(mapping), "utf-8")
    return sm.run(folder / "m.yaml", options=FAST).path


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Returns all files but the receipt, which says which rule made what."""
    every = (path for path in folder.rglob("*") if path.is_file() and path.name != "shardmerge.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in every}


LLAVA = {name: str(path) for name, path in BASES.items()}
# Source, and what the conversion is told besides.
CASES: Mapping[str, tuple[Path | str, dict[str, object]]] = {
    "ZeRO-1": (zero("llama_z1_w2_bf16"), {}),
    "ZeRO-2, 16-bit": (zero("llama_z2_w2_bf16"), {"view": "module"}),
    "ZeRO-3, cast": (zero("llama_z3_w2_bf16"), {"dtype": "bfloat16", "shard_size": "100KB"}),
    "ZeRO-3, tied": (zero("tied_z3_w2_bf16"), {"format": "bin"}),
    "ZeRO-2, with Adam": (zero("llama_z2_w2_bf16"), {"format": "zero-universal", "optimizer": True}),
    "ZeRO-3, with Adam": (zero("bag_z3_w3_bf16"), {"format": "dcp", "optimizer": True}),
    "Trainer, with its files": (GOLDEN / "hf_trainer" / "checkpoint-2", {"files": "all", "dtype": "float16"}),
    "universal": (entry("universal/bag_z2_w3_bf16"), {"shard_size": 50_001}),
    "distributed": (entry("dcp/fsdp2_w2_bf16"), {"format": "dcp", "dcp_root": ""}),
    "distributed, a model of several": (entry("dcp/several_models_w2_fp32"), {"root": "teachers.0"}),
    "a pickle a rank": (entry("ranks/fsdp2_w2_bf16"), {}),
    "a .bin": (GOLDEN / "xtuner" / "base_clip", {}),
    "safetensors, only a part": (GOLDEN / "xtuner" / "base_llm", {"partial": True}),
    "XTuner's .pth": (case_of("frozen_z2"), {"use": "xtuner/llava-to-hf", "bases": LLAVA}),
    "a preset with a number": (
        truth("meta_llama3_tp2_gqa"),
        {"use": "llama/hf-to-meta", "let": {"ranks": "2"}},
    ),
    "an adapter": ("ADAPTER", {"bases": {"base": str(GOLDEN / "xtuner" / "base_llm")}}),
}
_OPTIONS = ("dtype", "shard_size", "format", "files", "partial", "optimizer")


def told(said: Mapping[str, object]) -> tuple[dict[str, object], sm.Options]:
    options = {key: said[key] for key in _OPTIONS if key in said}
    if "dcp_root" in said:
        options["root"] = said["dcp_root"]
    return {key: value for key, value in said.items() if key not in {*_OPTIONS, "dcp_root"}}, sm.Options(
        sync=False, **options
    )


@pytest.mark.parametrize("case", CASES)
def test_a_saved_mapping_makes_the_same(case: str, adapter: Path, tmp_path: Path) -> None:
    source, said = CASES[case]
    more, options = told(said)
    (tmp_path / "maps").mkdir()
    mapping = tmp_path / "maps" / "m.yaml"
    made = sm.convert(
        adapter if source == "ADAPTER" else source, tmp_path / "out", save_mapping=mapping, options=options, **more
    )  # type: ignore[arg-type]
    again = sm.run(mapping, tmp_path / "again", FAST)
    assert again.plan.id == made.plan.id
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
    assert again.plan.warnings == made.plan.warnings or set(again.plan.warnings) < set(made.plan.warnings)
    assert api.prepare(mapping, FAST).out == tmp_path / "out"
    sm.verify(tmp_path / "out", sources=mapping)
    first = next(iter(made.plan.tensors()))
    assert first.name in sm.api.explain_text(mapping, first.name)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model of transformers, and its weights alone with a wrapper's prefix."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', "utf-8")
    state = load_file(tmp_path / "model" / "model.safetensors")
    torch.save({f"net.{name}": tensor for name, tensor in state.items()}, tmp_path / "run.pt")
    (tmp_path / "config_alone").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "config_alone")
    return tmp_path


@pytest.mark.parametrize("place", ["model", "config_alone"])
def test_config_and_prefix_make_a_model_of_weights_alone(llama: Path, place: str) -> None:
    """With a model's weights beside its config.json, and without: the result is loaded by transformers."""
    out, mapping = llama / "out", llama / "m.yaml"
    shardmerge(
        "convert", llama / "run.pt", out, "--strip", "net.", "--config", llama / place, "--save-mapping", mapping
    )
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = LlamaForCausalLM.from_pretrained(llama / "model").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert (out / "tokenizer_config.json").exists() == (place == "model")
    shardmerge("run", mapping, "-o", llama / "again")
    assert bytes_of(llama / "again") == bytes_of(out)
    assert "strip: [net.]" in mapping.read_text("utf-8")


def test_a_config_of_another_model_is_refused(llama: Path) -> None:
    config = json.loads((llama / "config_alone" / "config.json").read_text("utf-8"))
    for key, value, code in (("num_hidden_layers", 3, "incomplete-model"), ("vocab_size", 128, "config-disagrees")):
        (llama / "config_alone" / "config.json").write_text(json.dumps({**config, key: value}), "utf-8")
        command = ("convert", llama / "run.pt", llama / "out", "--strip", "net.", "--config", llama / "config_alone")
        assert f"[{code}]" in shardmerge(*command, code=1).stderr
        assert not (llama / "out").exists()


MISTAKES: Mapping[str, tuple[list[str], str, list[str]]] = {
    "no dot": (["--strip", "net"], "strip-matches-nothing", ["--strip", "net."]),
    "a wildcard": (["--strip", "net.*"], "strip-matches-nothing", ["--strip", "net."]),
    "not there": (["--strip", "module."], "strip-matches-nothing", []),
    "the file itself": (["--config", "model/config.json"], "missing-config", ["--config", "model"]),
    "the folder above": (["--config", "."], "missing-config", ["--config", "config_alone"]),
    "with a preset": (["--use", "peft/merge", "--config", "model"], "no-effect", ["--base", "base=model"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_with_what_to_write_instead(
    llama: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama)
    wrong, code, right = MISTAKES[mistake]
    done = shardmerge("convert", "run.pt", "out", *wrong, code=1 if code.startswith("strip") else 2)
    assert f"[{code}]" in done.stderr
    assert " ".join(right[-2:]) in done.stderr.replace("./", "")
    if "--use" not in wrong:
        shardmerge("convert", "run.pt", "out", *right, "--dry-run")


def test_two_names_that_would_be_one(tmp_path: Path) -> None:
    save_file({"net.w": torch.zeros(2), "w": torch.ones(2)}, tmp_path / "a.safetensors")
    done = shardmerge("convert", tmp_path / "a.safetensors", tmp_path / "out", "--strip", "net.", code=1)
    assert "[strip-makes-one]" in done.stderr
    assert "net.w" in done.stderr


def test_the_file_says_little_and_is_relative_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a person would write it, even where the folder is reached by a link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "maps").mkdir(parents=True)
    (tmp_path / "maps").symlink_to("real/maps")
    shutil.copytree(zero("llama_z3_w2_bf16"), tmp_path / "ck pt")
    command = ("convert", "ck pt", "out", "--dtype", "bf16", "--max-memory", "100MB")
    told = shardmerge(*command, "--dry-run", "--save-mapping", "maps/m.yaml")
    assert "shardmerge run maps/m.yaml" in told.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "maps" / "m.yaml").read_text("utf-8").splitlines() == [
        "# shardmerge convert 'ck pt' out --dtype bf16 --max-memory 100MB",
        "# `shardmerge run` makes the same bytes of this file.",
        "shardmerge: 1",
        "sources:",
        '  source: "../../ck pt"',
        "output:",
        "  path: ../../out",
        "  dtype: bfloat16",
        "target: {name: state-dict, text: source}  # its config.json, tokenizer and other files go along",
        "tensors:",
        '  "{rest...}": "source:{rest...}"',
    ]
    shardmerge(*command, "--save-mapping", "maps/m.yaml")  # the same text again is no harm
    shardmerge("verify", "out", "--sources", "maps/m.yaml")
    refused = shardmerge(*command, "--shard-size", "1GB", "--dry-run", "--save-mapping", "maps/m.yaml", code=1)
    assert "[output-exists]" in refused.stderr


def test_the_way_back_of_a_saved_mapping(tmp_path: Path) -> None:
    """Weights that kept their names and types come back as they were."""
    mapping = tmp_path / "m.yaml"
    sm.convert(GOLDEN / "xtuner" / "base_llm", tmp_path / "out", save_mapping=mapping, options=FAST)
    shardmerge("invert", mapping, "-o", tmp_path / "back.yaml")
    back = sm.run(tmp_path / "back.yaml", tmp_path / "back", FAST).path
    assert not list(sm.diff(back, GOLDEN / "xtuner" / "base_llm"))


def test_a_wrapped_model_is_stripped_and_what_stands_beside_it_dropped(llama: Path) -> None:
    state = load_file(llama / "model" / "model.safetensors")
    wrapped = {f"_forward_module.model.{name}": tensor for name, tensor in state.items()}
    save_file({**wrapped, "_forward_module.loss_mean": torch.zeros(1)}, llama / "model" / "model.safetensors")
    made = sm.convert(llama / "model", llama / "out", save_mapping=llama / "m.yaml", options=FAST)
    again = sm.run(llama / "m.yaml", llama / "again", FAST)
    assert again.plan.id == made.plan.id
    assert load_file(llama / "again" / "model.safetensors").keys() == state.keys()
    text = (llama / "m.yaml").read_text("utf-8")
    assert "strip: [_forward_module., model.]" in text
    assert "- source:loss_mean" in text.replace('"', "")
