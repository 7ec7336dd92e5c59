"""Configurations of mergekit 0.1.5 become mappings that make the same weights (tests/golden/make/make_mergekit.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import shardmerge
from shardmerge import api
from shardmerge.errors import ShardmergeError
from tests.conftest import GOLDEN

ROOT = Path(__file__).parent.parent
FOLDER = GOLDEN / "mergekit"
SAID = json.loads((FOLDER / "configs.json").read_text("utf-8"))
with safe_open(FOLDER / "results.safetensors", "pt") as _file:
    RESULTS = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118
# What a type rounds to, relative to the number.
STEPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# mergekit computes in float32 here, and rounds after every step; the longest chains are those of norms and angles.
CHAIN = 64
# Where mergekit is told to read and to compute in another type than float32: its rounding is larger, and its own.
WORK = {"layers": 0.0, "slerp-models": 2.0**-9 / CHAIN, "chain": 2.0**-10 / CHAIN}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models, and the current one."""
    shutil.copytree(FOLDER / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(config: Path) -> Path:
    proposal = api.init(config, mapping=Path("mapping.yaml"))
    Path("mapping.yaml").write_text(proposal.text, "utf-8")
    return shardmerge.run(Path("mapping.yaml"), options=shardmerge.Options(sync=False)).path


def compare(found: dict[str, torch.Tensor], name: str) -> None:
    wanted = {key.partition("/")[2]: value for key, value in RESULTS.items() if key.startswith(f"{name}/")}
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        step, work = STEPS[tensor.dtype], 2.0**-24
        if name in WORK:
            work = WORK[name]
        size = max(float(tensor.abs().max()), 0.2)
        apart = (found[key].double() - tensor.double()).abs()
        # One rounding of the output, and what rounding on the way may have moved.
        assert (apart <= 2 * step * tensor.double().abs() + CHAIN * work * size).all(), (key, float(apart.max()))


TOKENS = [name for name in SAID if "tokens" in SAID[name]]


@pytest.mark.parametrize("name", TOKENS)
def test_rows_of_tokens_are_those_of_mergekit(name: str, place: Path) -> None:
    """By token: mergekit numbers new ones in the order of a hash table."""
    shutil.copytree(FOLDER / "tokens", place / "tokens")
    out = made(FOLDER / f"{name}.yml")
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    theirs = SAID[name]["tokens"]
    assert ids.keys() == theirs.keys()
    assert sorted(ids.values()) == list(range(len(ids)))
    found = load_file(out / "model.safetensors")
    order = [theirs[token] for token in sorted(ids, key=ids.__getitem__)]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(found[key]) == len(ids)
        RESULTS[f"{name}/{key}"] = RESULTS[f"{name}/{key}"][order]
    compare(found, name)
    assert json.loads((out / "config.json").read_text("utf-8"))["vocab_size"] == SAID[name]["vocab_size"]
    transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("name", sorted({*SAID} - {*TOKENS}))
def test_a_configuration_makes_what_mergekit_makes(name: str, place: Path) -> None:
    out = made(FOLDER / f"{name}.yml")
    compare(load_file(out / "model.safetensors"), name)
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == SAID[name]["num_hidden_layers"]
    assert config.get("dtype", config.get("torch_dtype")) == SAID[name]["dtype"]


# The examples of the guide that do what one of the configurations does.
EXAMPLES = {
    "breadcrumbs": "breadcrumbs_ties", "nuslerp": "nuslerp", "multislerp": "multislerp", "karcher": "karcher",
    "stock": "model_stock", "sce": "sce", "ram": "ram", "nearswap": "nearswap", "fusion": "arcee_fusion",
    "gradient": "slerp-gradient", "layers": "layers", "chain": "chain",
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_makes_what_mergekit_makes(name: str, place: Path) -> None:
    shutil.copy(ROOT / "docs" / "examples" / f"merge-{name}.yaml", place)
    out = shardmerge.run(place / f"merge-{name}.yaml", options=shardmerge.Options(sync=False)).path
    compare(load_file(out / "model.safetensors"), EXAMPLES[name])


def test_the_example_of_della_keeps_half_of_the_changes(place: Path) -> None:
    """Of the signs that win, and each delta with its norm: the law itself is tested with the op."""
    shutil.copy(ROOT / "docs" / "examples" / "merge-della.yaml", place)
    out = shardmerge.run(place / "merge-della.yaml", options=shardmerge.Options(sync=False)).path
    found, base = load_file(out / "model.safetensors"), load_file(place / "models" / "base" / "model.safetensors")
    changed = sum(int((found[name] != base[name]).sum()) for name in base)
    assert abs(changed / sum(value.numel() for value in base.values()) - 0.75) < 0.05  # of two models, one at least


def test_an_adapter_is_a_model(place: Path) -> None:
    """`path+lora`, as mergekit writes it."""
    shutil.copytree(GOLDEN / "xtuner" / "base_llm", place / "llm")
    Path("lora.yml").write_text("models:\n  - {model: ./llm+adapters/one, parameters: {weight: 1}}\n"
                                "  - {model: ./llm, parameters: {weight: 1}}\nmerge_method: linear\n")  # fmt: skip
    text = api.init(Path("lora.yml")).text
    lines = text.replace("./llm", "llm").splitlines()
    assert lines[3:8] == [
        '  llm: "llm"',
        '  one: "adapters/one"',
        '  llm-2: "llm"',
        "adapters:",
        "  - {from: one, onto: llm}",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modules: {default: {models: []}}\n", "modules"),
        ("tokenizer: {source: union, pad_to_multiple_of: -8}\n", "pad_to_multiple_of"),
        ("tokenizer: {sauce: union}\n", "sauce"),
        ("tokenizer: {tokens: {a: 3}}\n", "tokens"),
        ("chat_template: chatmi\n", "chatmi"),
        ("base_model: {model: models/base, override_architecture: x}\n", "override_architecture"),
    ],
)
def test_what_a_mapping_cannot_say_is_named(text: str, words: str, place: Path) -> None:
    models = "" if "modules" in text else "models: [{model: models/chat}, {model: models/code}]\n"
    Path("merge.yml").write_text(f"merge_method: karcher\n{models}{text}")
    with pytest.raises(ShardmergeError) as caught:
        api.init(Path("merge.yml"))
    assert caught.value.code == "not-sayable"
    assert words in caught.value.what
    assert caught.value.where.startswith("merge.yml:")


def test_one_tokenizer_for_all_changes_nothing(place: Path) -> None:
    shutil.copytree(FOLDER / "tokens", place / "tokens")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(place / "tokens" / "chat" / name, place / "tokens" / "code" / name)
    Path("m.yml").write_text("models: [{model: tokens/chat}, {model: tokens/code}]\nmerge_method: karcher\n")
    plain = api.init(Path("m.yml")).text
    for source in ("union", "base", "tokens/chat"):
        two = "models: [{model: tokens/chat}, {model: tokens/code}]\n"
        Path("m.yml").write_text(f"{two}merge_method: karcher\ntokenizer_source: {source}\n")
        assert api.init(Path("m.yml")).text == plain
    Path("m.yml").write_text(
        "models: [{model: tokens/chat}, {model: models/code}]\nmerge_method: karcher\ntokenizer_source: union\n"
    )
    with pytest.raises(ShardmergeError, match=r"has no tokenizer\.json"):
        api.init(Path("m.yml"))


def test_a_filter_of_numbers_is_not_guessed_at(place: Path) -> None:
    """Layers get other numbers, and mergekit's filter sees the old ones for weights, the new ones for t."""
    config = (FOLDER / "layers-scaled.yml").read_text("utf-8").replace("o_proj", "layers.1.")
    Path("merge.yml").write_text(config)
    with pytest.raises(ShardmergeError, match="a filter with a number"):
        api.init(Path("merge.yml"))
