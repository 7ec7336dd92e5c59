"""What is said has an effect, or is refused: every key of a mapping, every option, every parameter that can be idle.

The table has a row for each thing that can be said in vain. What may be said in vain, since it names the state that is
wanted (`dtype` of a model that has it, `rows` that are there, `trim`, `required: false`, `keep` without a cast, a
second drop of the same name), has a row in `FINE`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge.mapping import spec
from shardmerge.mapping.near import did_you_mean
from shardmerge.ops.registry import OPS
from tests.conftest import shardmerge

EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    (folder / "a").mkdir()
    tensors = {EMBED: torch.randn(8, 4), "lm_head.weight": torch.randn(8, 4), "ids": torch.arange(3)}
    save_file(tensors, folder / "a" / "model.safetensors")
    (folder / "a" / "config.json").write_text('{"vocab_size": 8, "model_type": "x", "nothing": null}')
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_text('{"hidden": 4}')
    torch.save({"state_dict": {"module.w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}}, folder / "t.pth")
    return folder


ALL = 'tensors: {"{n...}": "a:{n...}"}\n'
REST = 'rest: {"{n...}": "a:{n...}"}\n'
HF = "target: {name: hf/model, text: a}\n"

# what it is, the mapping behind `shardmerge: 1`, the code
IDLE = {
    "a card without a target": ("sources: {a: a}\noutput: {path: o, card: true}\n" + ALL, "no-effect"),
    "optimizer of safetensors": ("sources: {a: a}\noutput: {path: o, optimizer: true}\n" + ALL, "no-effect"),
    "view of safetensors": ("sources: {a: {path: a, view: module}}\noutput: o\n" + ALL, "no-effect"),
    "view of a torch file": (
        'sources: {a: {path: t.pth, view: module}}\noutput: o\ntensors: {"{n...}": "a:{n...}"}\n',
        "no-effect",
    ),
    "root of safetensors": ("sources: {a: {path: a, root: model}}\noutput: o\n" + ALL, "no-effect"),
    "root that is not there": ("sources: {a: {path: t.pth, root: emma}}\noutput: o\n" + ALL, "unknown-root"),
    "strip": ('sources: {a: {path: a, strip: "module."}}\noutput: o\n' + ALL, "strip-matches-nothing"),
    "strip of no tensors": (
        'sources: {a: a, c: {path: empty, strip: "module."}}\noutput: o\nlet: {h: c.config.hidden}\n'
        'tensors: {"{n...}": "a:{n...}", x: {op: fill, shape: [h]}}\n',
        "strip-matches-nothing",
    ),
    "a source that only has a config": ("sources: {a: a, c: empty}\noutput: o\n" + ALL, "unknown-source"),
    "keep": ("sources: {a: a}\noutput: {path: o, dtype: bf16, keep: [nothing]}\n" + ALL, "keep-matches-nothing"),
    "dtypes": ("sources: {a: a}\noutput: {path: o, dtypes: {nothing: bf16}}\n" + ALL, "keep-matches-nothing"),
    "dtypes behind others": (
        'sources: {a: a}\noutput: {path: o, dtypes: {"{n...}": bf16, lm_head.weight: float32}}\n' + ALL,
        "no-effect",
    ),
    "dtypes behind keep": (
        "sources: {a: a}\noutput: {path: o, keep: [lm_head.weight], dtypes: {lm_head.weight: bf16}}\n" + ALL,
        "no-effect",
    ),
    "dtypes of integers": ("sources: {a: a}\noutput: {path: o, dtypes: {ids: float32}}\n" + ALL, "no-effect"),
    "dtypes of an op cast": (
        "sources: {a: a}\noutput: {path: o, dtypes: {x: float16}}\n"
        f"tensors: {{x: {{op: cast, of: a:{EMBED}, dtype: bf16}}}}\nrest: {{\"{{n...}}\": \"a:{{n...}}\"}}\n",
        "no-effect",
    ),
    "a variable": ("sources: {a: a}\noutput: o\nlet: {n: 2}\n" + ALL, "unused-variable"),
    "vocabulary without a target": ("sources: {a: a}\noutput: o\nvocabulary: {rows: 16}\n" + ALL, "no-target"),
    "vocabulary without a number": (
        f"sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{new: zeros}}\n{ALL}",
        "no-effect",
    ),
    "vocabulary multiple of 1": (f"sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{multiple: 1}}\n{ALL}", "no-effect"),
    "vocabulary without tokens": (f"sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{tokens: []}}\n{ALL}", "no-effect"),
    "vocabulary of nothing": (f"sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{}}\n{ALL}", "no-effect"),
    "vocabulary seed": (f"sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{rows: 16, seed: 3}}\n{ALL}", "no-effect"),
    "vocabulary row": (
        f"sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{rows: 16, new: zeros, row: 3}}\n{ALL}",
        "no-effect",
    ),
    "vocabulary pad": (f'sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{rows: 16, pad: "<p>"}}\n{ALL}', "no-effect"),
    "an unknown option of a target": (
        f"sources: {{a: a}}\noutput: o\ntarget: {{name: hf/model, text: a, tie: x}}\n{ALL}",
        "unknown-role",
    ),
    "seed of new_rows": (
        f"sources: {{a: a}}\noutput: o\ntensors: {{x: {{op: new_rows, of: a:{EMBED}, rows: 2, seed: 3}}}}\n",
        "no-effect",
    ),
    "row of new_rows": (
        f"sources: {{a: a}}\noutput: o\ntensors: {{x: {{op: new_rows, of: a:{EMBED}, rows: 2, new: mean, row: 3}}}}\n",
        "no-effect",
    ),
    "for inside of an op": (
        "sources: {a: a}\noutput: o\n"
        "tensors: {x: {op: transpose, of: {op: chunk, of: a:lm_head.weight, chunks: 2, take: 0, for: {r: 2}}}}\n",
        "no-effect",
    ),
    "for of what the target does not have": (
        "sources: {a: a}\noutput: o\ntensors: {x: {op: slice, of: a:lm_head.weight, for: {r: 1}}}\n",
        "no-effect",
    ),
    "for that candidates disagree on": (
        'sources: {a: a}\noutput: o\ntensors: {"x.{r}": [{op: chunk, of: a:q, chunks: 2, take: r, for: {r: 2}}, '
        "{op: chunk, of: a:lm_head.weight, chunks: 4, take: r, for: {r: 4}}]}\n",
        "op-value",
    ),
    "a drop": ("sources: {a: a}\noutput: o\n" + ALL + "drop: [a:nothing]\n", "drop-matches-nothing"),
    "a rule": ("sources: {a: a}\noutput: o\n" + ALL[:-2] + ', y: "a:nothing"}\n', "rule-matches-nothing"),
    "a rule of rest": ("sources: {a: a}\noutput: o\n" + ALL + 'rest: {y: "a:nothing"}\n', "rule-matches-nothing"),
}  # fmt: skip

FINE = {
    "the type that is there": "sources: {a: a}\noutput: {path: o, dtype: float32}\n" + ALL,
    "the view that is the default": "sources: {a: {path: a, view: fp32}}\noutput: o\n" + ALL,
    "keep without a cast": "sources: {a: a}\noutput: {path: o, keep: [lm_head.weight]}\n" + ALL,
    "a source that may be absent": "sources: {a: {path: a, required: false}}\noutput: o\n" + ALL,
    "rows that are there": f"sources: {{a: a}}\noutput: o\n{HF}vocabulary: {{rows: 8, trim: true}}\n{ALL}",
    "a drop twice": 'sources: {a: a}\noutput: o\ntensors: {"{n}": "a:{n}"}\n'
    'drop: ["a:{x}.{y...}", "a:lm_head.weight"]\n',
    "a root": 'sources: {a: {path: t.pth, root: ema}}\noutput: o\ntensors: {"{n...}": "a:{n...}"}\n',
    "for in a list of candidates": 'sources: {a: a}\noutput: o\ntensors: {"x.{r}": ["a:q.{r}", '
    '{op: chunk, of: a:lm_head.weight, chunks: 2, take: r, for: {r: 2}}]}\nrest: {"{n...}": "a:{n...}"}\n',
}  # fmt: skip


def planned(world: Path, name: str, text: str) -> sm.Plan:
    path = world / f"{name.replace(' ', '-')}.yaml"
    path.write_text(f"shardmerge: 1\n{text}", "utf-8")
    return sm.plan(path)


@pytest.mark.parametrize("name", IDLE)
def test_what_has_no_effect_is_refused(name: str, world: Path) -> None:
    text, code = IDLE[name]
    with pytest.raises(sm.ShardmergeError) as caught:
        planned(world, name, text)
    assert code in {one.code for one in caught.value.each()}
    assert all(one.hint or one.expected for one in caught.value.each())


@pytest.mark.parametrize("name", FINE)
def test_what_names_the_state_that_is_wanted_is_fine(name: str, world: Path) -> None:
    assert list(planned(world, f"fine {name}", FINE[name]).tensors())


def test_every_key_of_a_mapping_is_in_a_table() -> None:
    """A new key needs a row, or a reason here."""
    said = " ".join([*(text for text, _ in IDLE.values()), *FINE.values()])
    elsewhere = {
        "shardmerge", "use", "adapters", "shard_size", "format", "multiple", "tokens",
        # Settings of adapters stand instead of what a file says: tests/test_adapters.py.
        "r", "alpha", "rslora", "fan_in_fan_out", "name", "weight",
        "combination_type",
    }  # fmt: skip
    keys = {*spec.KEYS, *spec.SOURCE_KEYS, *spec.OUTPUT_KEYS, *spec.VOCABULARY_KEYS, *spec.ADAPTER_SETTINGS}
    known = {"config", "files", "partial"}  # checked where they are explained
    assert {key for key in keys if f"{key}:" not in said} - elsewhere - known == set()


def test_every_parameter_that_only_some_values_use_says_so() -> None:
    """`seed`, `row`: parameters of a way that another parameter chooses."""
    chosen = {(kind.name, param.name) for kind in OPS.values() for param in kind.params if param.only_with is not None}
    # These choose between ways that have no parameters of their own.
    plain = {"rescale", "along"}
    choosing = {
        kind.name for kind in OPS.values() for param in kind.params if param.choices and param.name not in plain
    }
    assert {name for name, _ in chosen} == choosing
    assert chosen == {("new_rows", "row"), ("new_rows", "seed")}


def test_a_target_that_has_no_vocabulary(golden: Path, tmp_path: Path) -> None:
    clip = golden / "xtuner" / "base_clip"
    (tmp_path / "m.yaml").write_text(
        f"shardmerge: 1\nsources: {{clip: {clip}}}\noutput: o\nuse: clip/hf-to-vision\nvocabulary: {{rows: 64}}\n"
    )
    with pytest.raises(sm.ShardmergeError, match="hf/clip-vision has no tensor over the vocabulary") as caught:
        sm.plan(tmp_path / "m.yaml")
    assert caught.value.code == "no-effect"


def test_a_variable_of_a_preset_whose_rule_is_replaced(golden: Path, tmp_path: Path) -> None:
    hf = golden / "layouts" / "torchtune_llama3_gqa" / "truth"
    rule = '"layers.{i}.attn.k_proj.{p:weight|bias}": "hf:model.layers.{i}.self_attn.k_proj.{p:weight|bias}"'
    head = f"shardmerge: 1\nsources: {{hf: {hf}}}\noutput: o\nuse: llama/hf-to-torchtune\ntensors:\n  {rule}\n"
    (tmp_path / "m.yaml").write_text(head + "let: {kv_heads: 2}\n")
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.plan(tmp_path / "m.yaml")
    assert caught.value.code == "unused-variable"
    (tmp_path / "m.yaml").write_text(head + "let: {heads: 4}\n")
    assert list(sm.plan(tmp_path / "m.yaml").tensors())


def test_a_format_that_the_target_does_not_have_is_a_warning(golden: Path, tmp_path: Path) -> None:
    hf = golden / "layouts" / "meta_llama3_tp2_gqa" / "truth"
    (tmp_path / "m.yaml").write_text(f"shardmerge: 1\nsources: {{hf: {hf}}}\noutput: o\nuse: llama/hf-to-meta\n")
    assert not sm.plan(tmp_path / "m.yaml").warnings
    warned = sm.plan(tmp_path / "m.yaml", sm.Options(format="safetensors")).warnings
    assert warned == ("the format `safetensors` has no effect: meta/llama always writes .pth",)


COMMANDS = {
    "view": ("convert", "a", "o", "--view", "module"),
    "root": ("convert", "a", "o", "--root", "model"),
    "view of inspect": ("inspect", "a", "--view", "module"),
    "root of inspect": ("inspect", "a", "--root", "model"),
    "root through a preset": ("convert", "a", "o", "--use", "llama/hf-to-hf", "--root", "model"),
    "let without a preset": ("convert", "a", "o", "--let", "n=2"),
    "let that the preset has not": ("convert", "a", "o", "--use", "llama/hf-to-hf", "--let", "ranks=2"),
    "base without a preset": ("convert", "a", "o", "--base", "b=a"),
    "dtype of verify": ("verify", "a", "--dtype", "bf16"),
    "format of verify": ("verify", "a", "--format", "bin"),
    "dcp root of another format": ("convert", "a", "o", "--dcp-root", "model"),
    "dcp root of verify": ("verify", "a", "--dcp-root", "model"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_commands(name: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    found = shardmerge(*COMMANDS[name], code=2)
    assert found.stderr.startswith("error: ")
    assert "[no-effect]" in found.stderr or "--let" in name or "let" in name or "base" in name
    assert not (world / "o").exists()


# --- budgets and hints ---


def test_a_rule_makes_no_more_targets_than_a_budget(world: Path) -> None:
    rule = '"x.{r}.{q}": {op: slice, of: a:lm_head.weight, for: {r: 2000, q: 2000}}'
    with pytest.raises(sm.ShardmergeError) as caught:
        planned(
            world, "many", f'sources: {{a: a}}\noutput: o\ntensors: {{{rule}}}\nrest: {{"{{n...}}": "a:{{n...}}"}}\n'
        )
    (error,) = caught.value.each()
    assert error.code == "too-many-targets"
    assert "4,000,000" in error.what


def test_did_you_mean_is_never_what_was_written(world: Path) -> None:
    assert did_you_mean("head", ["head"]) == ""
    assert did_you_mean("head", ["head", "heads"]) == "did you mean `heads`?"
    rule = "{op: slice, of: a:lm_head.weight, stop: a.config.nothing}"
    with pytest.raises(sm.ShardmergeError) as caught:
        planned(
            world, "null", f'sources: {{a: a}}\noutput: o\ntensors: {{x: {rule}}}\nrest: {{"{{n...}}": "a:{{n...}}"}}\n'
        )
    (error,) = caught.value.each()
    assert error.code == "unknown-value"
    assert "`a.config.nothing`" not in error.hint


def test_yaml_beside_weights_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    """Seven lists of nine aliases each are 5 million values in 300 bytes."""
    rows = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    rows += [f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)]
    (tmp_path / "model_config.yaml").write_text("\n".join(rows))
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "lit_model.pth")
    (tmp_path / "m.yaml").write_text(
        f"shardmerge: 1\nsources: {{lit: {tmp_path}}}\noutput: o\nuse: llama/litgpt-to-hf\n"
    )
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.plan(tmp_path / "m.yaml")
    assert caught.value.code == "bad-yaml"


def test_formulas_read_a_model_config_as_yaml_does(tmp_path: Path) -> None:
    """The target and the formulas go by one reader, which takes an alias of a scalar as every YAML library does."""
    text = "n_head: &heads 4\nn_query_groups: *heads\nrope: {base: 1.0e+1}\n"
    (tmp_path / "model_config.yaml").write_text(text)
    torch.save({"weight": torch.zeros(16, 2)}, tmp_path / "lit_model.pth")
    rules = "".join(
        f"  {name}: {{op: slice, of: lit:weight, stop: lit.model_config.{name}}}\n"
        for name in ("n_query_groups", "rope.base")
    )
    (tmp_path / "m.yaml").write_text(f"shardmerge: 1\nsources: {{lit: {tmp_path}}}\noutput: o\ntensors:\n{rules}")
    config = yaml.safe_load(text)
    found = {tensor.name: tensor.shape[0] for tensor in sm.plan(tmp_path / "m.yaml").tensors()}
    assert found == {"n_query_groups": config["n_query_groups"], "rope.base": config["rope"]["base"]}
