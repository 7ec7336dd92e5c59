"""mapping.yaml: what it may say, and that every mistake is told with its place. Presets are read here too."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shardmerge.dtypes import DTYPES
from shardmerge.errors import MappingError, Problems, ShardmergeError, UsageError
from shardmerge.mapping.near import NameIndex, did_you_mean, listed
from shardmerge.mapping.preset_files import list_presets, load_preset, read_preset, with_preset
from shardmerge.mapping.reader import load_spec, parse_spec
from shardmerge.mapping.spec import references
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.targets.registry import TARGETS

FULL = """\
shardmerge: 1
sources:
  trained: work/iter_1.pth
  base: {path: "models/llama", required: false, view: module, root: model.inner}
output:
  path: out/model
  dtype: bf16
  shard_size: 5GB
target: {name: hf/llava, text: base, trained: trained}
tensors:
  lm.{rest...}: ["trained:llm.{rest...}", 'base:{rest...}']
  p.{i:int}.w: trained:projector.{i}.w
drop:
  - base:{rest...}.inv_freq
"""

START = "shardmerge: 1\nsources:\n  a: x.pth\n  base: y\n"  # 4 lines, what follows begins on line 5


def problems(text: str) -> list[ShardmergeError]:
    with pytest.raises(ShardmergeError) as caught:
        parse_spec(text, "m.yaml")
    return list(caught.value.each())


def only(text: str) -> ShardmergeError:
    found = problems(text)
    assert len(found) == 1, [str(one) for one in found]
    return found[0]


def test_a_whole_mapping():
    spec = parse_spec(FULL, "m.yaml")
    assert spec.file == "m.yaml"
    assert [(s.name, s.path, s.required, s.view, s.root) for s in spec.sources.values()] == [
        ("trained", "work/iter_1.pth", True, "", ""),
        ("base", "models/llama", False, "module", "model.inner"),
    ]
    assert spec.output is not None
    assert (spec.output.path, spec.output.dtype, spec.output.shard_size) == ("out/model", DTYPES["BF16"], 5 * 10**9)
    assert spec.target is not None
    assert (spec.target.name, spec.target.roles) == ("hf/llava", {"text": "base", "trained": "trained"})
    assert [(str(r.target), [(c.source, str(c.template)) for c in r.candidates]) for r in spec.rules] == [
        ("lm.{rest...}", [("trained", "llm.{rest...}"), ("base", "{rest...}")]),
        ("p.{i:int}.w", [("trained", "projector.{i}.w")]),
    ]
    assert [(d.source, str(d.template), str(d.mark)) for d in spec.drops] == [
        ("base", "{rest...}.inv_freq", "m.yaml:14:5")
    ]
    assert [str(rule.mark) for rule in spec.rules] == ["m.yaml:11:3", "m.yaml:12:3"]
    assert spec.rules[0].candidates[1].mark == Mark("m.yaml", 11, 43)


def test_the_short_forms():
    spec = parse_spec("shardmerge: 1\nsources: {a: x}\noutput: out\nuse: some/preset\ntarget: hf/llava\n", "m.yaml")
    assert (spec.output.path, spec.use, spec.target.name, spec.target.roles) == ("out", "some/preset", "hf/llava", {})
    assert (spec.output.dtype, spec.output.shard_size, spec.rules) == (None, None, ())


def test_left_out_parts_are_nothing():
    spec = parse_spec(START + "tensors:\n  x: a:x\n", "m.yaml")
    assert (spec.output, spec.use, spec.target, spec.drops) == (None, "", None, ())


@pytest.mark.parametrize("word", ["NO", "no", "012", "0o14", "1e3", "1:30", "2024-01-01", "0x10", "1_000", "true"])
def test_scalars_stay_text(word):
    spec = parse_spec(f"shardmerge: 1\nsources:\n  a: {word}\ntensors:\n  {word}: a:{word}\n", "m.yaml")
    assert spec.sources["a"].path == word
    assert str(spec.rules[0].target) == word


# --- YAML that is refused ---

YAML = [
    ("a: &x 1\nb: 2\n", "yaml-anchor", "m.yaml:1:4"),
    ("a: 1\nb: *x\n", "yaml-alias", "m.yaml:2:4"),
    ("a: {}\nb:\n  <<: {c: 1}\n", "yaml-merge-key", "m.yaml:3:3"),
    ("a: !!python/object:os.system x\n", "yaml-tag", "m.yaml:1:4"),
    ("a: !!str 1\n", "yaml-tag", "m.yaml:1:4"),
    ("a: ! x\n", "yaml-tag", "m.yaml:1:4"),
    ("a: 1\n---\nb: 2\n", "yaml-several-documents", "m.yaml:2:1"),
    ("a: [1, 2\nb: 3\n", "yaml-syntax", "m.yaml:2:2"),
    ("a:\n\t- b\n", "yaml-syntax", "m.yaml:2:1"),
    ("a: \x00\n", "yaml-syntax", "m.yaml:1:1"),
    ('a: "\\UFFFFFFFF"\n', "yaml-syntax", "m.yaml"),
    ('a: "\\ud800"\n', "yaml-syntax", "m.yaml:1:4"),
    ("", "yaml-empty", "m.yaml"),
    ("# nothing\n", "yaml-empty", "m.yaml"),
    ("{a: 1}: 2\n", "yaml-key", "m.yaml:1:1"),
    ("{rest...}: a:x\n", "yaml-key", "m.yaml:1:1"),
    ("a: " + "[" * 5000 + "\n", "yaml-too-deep", "m.yaml:1:19"),
    ("#" * (1 << 20) + "\n", "yaml-too-large", "m.yaml"),
]


@pytest.mark.parametrize(("text", "code", "where"), YAML, ids=[f"{case[1]}-{at}" for at, case in enumerate(YAML)])
def test_yaml_that_is_not_taken(text, code, where):
    error = only(text)
    assert (type(error), error.code, error.where) == (MappingError, code, where)


def test_a_duplicate_key_names_both_lines():
    error = only("a: 1\nb: 2\nc: 3\na: 4\n")
    assert (error.code, error.where) == ("duplicate-key", "m.yaml:4:1")
    assert "lines 1 and 4" in error.what


def test_all_duplicates_of_a_table_are_told():
    assert [error.where for error in problems("a: 1\na: 2\nb: 3\nb: 4\n")] == ["m.yaml:2:1", "m.yaml:4:1"]


@pytest.mark.parametrize("line", ["x.{r...}: [a:llm.{r...}, base:{r...}]", "x.{r...}: [a:{r...}]"])
def test_braces_in_brackets_want_quotes(line):
    error = only(START + f"tensors:\n  {line}\n")
    assert error.code in {"yaml-syntax", "wrong-kind"}
    assert "quotes" in error.hint


# --- what a mapping may not say ---

WRONG = [
    # text behind START, code, line:column, part of the hint
    ("tensor:\n  x: a:x\ntensors:\n  y: a:y\n", "unknown-key", "5:1", "`tensors`"),
    ("output: {paht: o, path: p}\ntensors:\n  x: a:x\n", "unknown-key", "5:10", "`path`"),
    ("output: {dtype: bf16}\ntensors:\n  x: a:x\n", "no-path", "5:9", "path:"),
    ("output: {path: o, dtype: int8}\ntensors:\n  x: a:x\n", "unknown-dtype", "5:26", "never cast"),
    ("output: {path: o, shard_size: 5GiB}\ntensors:\n  x: a:x\n", "bad-size", "5:31", "decimal"),
    ("output: {path: o, shard_size: big}\ntensors:\n  x: a:x\n", "bad-size", "5:31", ""),
    ("output: {path: o, shard_size: 0}\ntensors:\n  x: a:x\n", "bad-size", "5:31", ""),
    ("output: [o]\ntensors:\n  x: a:x\n", "wrong-kind", "5:9", ""),
    ("use: [x]\n", "wrong-kind", "5:6", ""),
    ("target: {text: a}\ntensors:\n  x: a:x\n", "no-target-name", "5:9", "add `name: hf/model`"),
    ("tensors: [x]\n", "wrong-kind", "5:10", ""),
    ("tensors:\n  x: b:x\n", "unknown-source", "6:6", ""),
    ("tensors:\n  x: bass:x\n", "unknown-source", "6:6", "`base`"),
    ("tensors:\n  x: [a:x, bsae:y]\n", "unknown-source", "6:12", "`base`"),
    ("tensors:\n  x: model.x\n", "no-source", "6:6", "a:model.x"),
    ("tensors:\n  x: []\n", "no-candidates", "6:3", ""),
    ("tensors:\n  x:\n", "no-source", "6:5", ""),
    ("tensors:\n  x: {op: splitt, of: a:x}\n", "unknown-op", "6:11", "split"),
    ("tensors:\n  x: {op: squeeze, off: a:x, of: a:x}\n", "unknown-key", "6:20", "of"),
    ("tensors:\n  x: {op: squeeze}\n", "missing-parameter", "6:6", ""),
    ("tensors:\n  x: {op: rotary_permute, of: a:x}\n", "missing-parameter", "6:6", "heads"),
    ("tensors:\n  x: {op: squeeze, of: a:x, dim: 1 +}\n", "bad-formula", "6:34", ""),
    ("tensors:\n  x: {op: cast, of: a:x, dtype: int8}\n", "unknown-dtype", "6:33", ""),
    ("tensors:\n  x: {op: squeeze, of: [a:x, a:y]}\n", "wrong-kind", "6:24", ""),
    ('tensors:\n  x: {op: squeeze, of: "a:{e*}"}\n', "collecting-one", "6:24", ""),
    ('tensors:\n  "{e*}": {op: stack, of: "a:{e*}"}\n', "collecting-target", "6:3", ""),
    ('tensors:\n  "x.{p}": {op: stack, of: "a:{e*}"}\n', "unbound-capture", "6:12", "for"),
    ('tensors:\n  "x.{i}": "a:{i + j}"\n', "bad-formula", "6:12", "target"),
    ("tensors:\n  x: {of: a:x}\n", "wrong-kind", "6:6", ""),
    ("tensors:\n  x: [[a:x]]\n", "wrong-kind", "6:7", ""),
    ('tensors:\n  x: "a:e.{e*}.w"\n', "collecting-one", "6:6", ""),
    ("let: {1x: 2}\ntensors:\n  x: a:x\n", "bad-name", "5:7", ""),
    ("adapters: [{from: a}]\ntensors:\n  x: a:x\n", "missing-parameter", "5:12", ""),
    ('adapters: [{from: "a:x", onto: a}]\ntensors:\n  x: a:x\n', "bad-capture", "5:19", "rest"),
    ("vocabulary: {rows: many}\ntensors:\n  x: a:x\n", "wrong-kind", "5:20", ""),
    ("vocabulary: {new: random}\ntensors:\n  x: a:x\n", "op-value", "5:19", "mean"),
    ("tensors:\n  x.{p}: a:x\n", "unbound-capture", "6:10", "captures"),
    ("tensors:\n  x: a:x.{p}\n", "unbound-capture", "6:6", "captures"),
    ("tensors:\n  x.{p: a:x\n", "unpaired-brace", "6:5", "{{"),
    ("tensors:\n  x: a:x.{p}{q}\n", "adjacent-captures", "6:13", ""),
    ('tensors:\n  x: "a:x.{p}{q}"\n', "adjacent-captures", "6:14", ""),
    ("tensors:\n  x: a:x\ndrop: a:y\n", "wrong-kind", "7:7", "`- source:name`"),
    ("tensors:\n  x: a:x\ndrop: [[a:y]]\n", "wrong-kind", "7:8", ""),
    ("tensors:\n  x: a:x\ndrop:\n  - bse:y\n", "unknown-source", "8:5", "`base`"),
    ("output: o\n", "no-rules", "1:1", "use:"),
]


@pytest.mark.parametrize(("text", "code", "where", "hint"), WRONG, ids=[f"{c[1]}-{i}" for i, c in enumerate(WRONG)])
def test_what_a_mapping_may_not_say(text, code, where, hint):
    error = problems(START + text)[0]
    assert (error.code, error.where) == (code, f"m.yaml:{where}")
    assert hint in error.what + error.hint


SOURCES = [
    ("sources: x\n", "wrong-kind", "2:10"),
    ("sources: {A: x}\n", "bad-source-name", "2:11"),
    ("sources: {a: ''}\n", "wrong-kind", "2:14"),
    ("sources: {a: [x]}\n", "wrong-kind", "2:14"),
    ("sources: {a: {root: m}}\n", "no-path", "2:11"),
    ("sources: {a: {path: x, required: yes}}\n", "wrong-kind", "2:34"),
    ('sources: {a: {path: x, required: "true"}}\n', "wrong-kind", "2:34"),
    ("sources: {a: {path: x, view: fp16}}\n", "unknown-view", "2:30"),
    ("sources: {a: {path: x, veiw: fp32}}\n", "unknown-key", "2:24"),
    ("", "no-sources", "1:1"),
]


@pytest.mark.parametrize(("text", "code", "where"), SOURCES)
def test_sources_that_are_off(text, code, where):
    error = problems("shardmerge: 1\n" + text + "tensors:\n  x: a:x\n")[0]
    assert (error.code, error.where) == (code, f"m.yaml:{where}")


@pytest.mark.parametrize(
    ("first", "code", "where"),
    [
        ("", "no-version", "1:1"),
        ("shardmerge: 2\n", "unknown-version", "1:13"),
        ("shardmerge: {}\n", "unknown-version", "1:13"),
    ],
)
def test_the_version_comes_first(first, code, where):
    error = only(first + "sources: {a: x}\ntensors:\n  x: a:x\n")
    assert (error.code, error.where) == (code, f"m.yaml:{where}")


def test_all_mistakes_are_told_together():
    text = START + "colour: red\noutput: {path: o, dtype: int4, shard_size: 1GiB}\ntensors:\n  x: b:x\n  y.{p}: a:y\n"
    found = problems(text)
    assert [error.code for error in found] == [
        "unknown-key",
        "unknown-dtype",
        "bad-size",
        "unknown-source",
        "unbound-capture",
    ]
    with pytest.raises(Problems):
        parse_spec(text, "m.yaml")


# --- files ---


def test_a_mapping_file_is_read(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + FULL.encode())
    assert load_spec(path).file == str(path)


def test_a_missing_file_is_a_usage_error_with_the_near_names(tmp_path):
    (tmp_path / "mapping.yaml").write_text(FULL)
    with pytest.raises(UsageError) as caught:
        load_spec(tmp_path / "maping.yaml")
    assert caught.value.code == "missing-path"
    assert "mapping.yaml" in caught.value.hint


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", None])
def test_a_checkpoint_or_a_directory_is_no_mapping(tmp_path, content):
    path = tmp_path / "m"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_spec(path)
    assert caught.value.code == "unreadable-mapping"
    assert content is None or caught.value.hint.endswith(f"shardmerge convert {path} OUT")


def test_a_mapping_that_the_system_does_not_let_read(tmp_path, monkeypatch):
    path = tmp_path / "m.yaml"
    path.write_text("shardmerge: 1\n")

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(MappingError, match="Permission denied") as caught:
        load_spec(path)
    assert (caught.value.code, caught.value.exit_code) == ("unreadable-mapping", 1)
    assert "namei -l" in caught.value.hint


def test_a_huge_file_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "model.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MappingError) as caught:
        load_spec(path)
    assert caught.value.code == "yaml-too-large"


# --- presets ---

USE = "shardmerge: 1\nsources: {trained: t, llm: l, vision: v}\nuse: xtuner/llava-to-hf\n"


def use(text: str):
    spec = parse_spec(text, "m.yaml")
    return with_preset(spec, load_preset(spec.use))


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_can_be_read(name):
    preset = load_preset(name)
    assert preset.title
    assert preset.description
    assert preset.rules or preset.target.name == "hf/names"  # whose rules follow from the config's family
    assert all(role.about for role in preset.roles.values())
    assert all(drop.optional for drop in preset.drops)
    if preset.target is not None:
        target = TARGETS[preset.target.name]
        assert set(preset.target.roles) <= {*target.roles, *target.options}
        played = [preset.target.roles[role] for role in preset.target.roles if role in target.roles]
        assert {name for text in played for name in text.split("|")} <= set(preset.roles)


def test_the_xtuner_preset():
    preset = load_preset("xtuner/llava-to-hf")
    assert {name: role.required for name, role in preset.roles.items()} == {
        "trained": True,
        "llm": False,
        "vision": False,
    }
    assert preset.target.name == "hf/llava"
    assert preset.target.roles == {"text": "llm", "vision": "vision", "trained": "trained"}


def test_a_preset_is_found_by_the_name_that_it_had_before():
    assert load_preset("llava/hf-to-legacy") == load_preset("hf/to-4.51")
    assert read_preset("llava/hf-to-5.6") == read_preset("hf/to-5.6")
    assert "llava/hf-to-legacy" not in list_presets()


@pytest.mark.parametrize("name", ["xtuner/llava-to-fh", "../spec", "xtuner", ""])
def test_an_unknown_preset(name):
    with pytest.raises(UsageError) as caught:
        load_preset(name)
    assert caught.value.code == "unknown-preset"
    if name == "xtuner/llava-to-fh":
        assert "xtuner/llava-to-hf" in caught.value.hint


def test_rules_of_the_preset_come_first_and_one_of_the_same_target_is_replaced():
    own = "tensors:\n  multi_modal_projector.linear_1.{p}: trained:proj.0.{p}\n  extra.{p}: trained:extra.{p}\n"
    spec = use(USE + own)
    replaced = "multi_modal_projector.linear_1.{p}"
    kept = [target for rule in load_preset(spec.use).rules if (target := str(rule.target)) != replaced]
    assert "multi_modal_projector.linear_2.{p}" in kept
    assert [(str(rule.target), rule.mark.file == "m.yaml") for rule in spec.rules] == [
        *((target, False) for target in kept),
        (replaced, True),
        ("extra.{p}", True),
    ]
    assert spec.target.name == "hf/llava"


def test_optional_roles_fall_away():
    spec = use("shardmerge: 1\nsources: {trained: t}\nuse: xtuner/llava-to-hf\n")
    taken = {one.source for rule in spec.rules for term in rule.candidates for one in references(term)}
    assert taken | {drop.source for drop in spec.drops} == {"trained"}
    assert spec.target.roles["vision"] == "vision"  # a target can name what is missing


def test_sources_that_a_preset_cannot_use_or_do_without():
    text = "shardmerge: 1\nsources:\n  train: t\n  llm: l\nuse: xtuner/llava-to-hf\ntensors:\n  x: lmm:x\n"
    with pytest.raises(Problems) as caught:
        use(text)
    missing, unused, unknown = caught.value.each()
    assert (missing.code, missing.where, missing.hint) == (
        "missing-source",
        "m.yaml",
        "add under `sources:`: `trained: PATH`",
    )
    assert "iter_N.pth" in missing.what
    assert (unused.code, unused.where, unused.hint) == ("unknown-source", "m.yaml:3:3", "did you mean `trained`?")
    assert (unknown.code, unknown.where, unknown.hint) == ("unknown-source", "m.yaml:7:6", "did you mean `llm`?")


# --- near names ---


def test_near_names_among_many():
    names = [f"model.layers.{i}.mlp.experts.{e}.w{k}" for i in range(20) for e in range(100) for k in (1, 2, 3)]
    names.append("model.embed_tokens.weight")
    index = NameIndex(names)
    assert index.near("model.embed_token.weight") == ["model.embed_tokens.weight"]
    assert index.near("modle.embed_tokens.weight") == ["model.embed_tokens.weight"]
    assert index.near("model.layers.7.mlp.experts.42.w4")[0].startswith("model.layers.7.mlp.experts.42.w")
    assert index.near("zzz") == []


def test_names_of_any_length_cost_nothing():
    assert NameIndex(["a" * 100_000, "b" * 255]).near("a" * 100_000) == []


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("paht", ["path", "dtype"], "did you mean `path`?"),
        ("q", ["path", "dtype"], "known here: dtype, path"),
        ("q", [], ""),
    ],
)
def test_did_you_mean(word, known, hint):
    assert did_you_mean(word, known) == hint


def test_lists_are_short_and_safe_for_a_terminal():
    assert listed([str(i) for i in range(9)]) == "0, 1, 2, 3, 4 and 4 more"
    assert listed(["a\x1b[2J"]) == "'a\\x1b[2J'"
    assert len(listed(["a" * 10_000])) < 300


def test_a_pipe_is_no_mapping_until_it_is_a_file(tmp_path: Path) -> None:
    """Opening a FIFO would wait for who writes to it."""
    os.mkfifo(tmp_path / "m.yaml")
    with pytest.raises(UsageError) as caught:
        load_spec(tmp_path / "m.yaml")
    assert (caught.value.code, caught.value.hint) == ("unreadable-mapping", "write the mapping to a file")
    (tmp_path / "m.yaml").unlink()
    (tmp_path / "m.yaml").write_text(FULL, "utf-8")
    assert load_spec(tmp_path / "m.yaml").sources.keys() == {"trained", "base"}
