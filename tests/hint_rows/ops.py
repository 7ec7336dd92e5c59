"""Mistakes in ops, numbers and the way back."""

from __future__ import annotations

import torch

from tests.following import Call, Follow, Row, argument, change, near, said
from tests.hint_rows.given import mapped, stored, told
from tests.test_mistakes import GQA, REST, one_op

HEAD = "m:lm_head.weight"
INVERT = ("invert", "mapping.yaml")


def codes(call: Call) -> None:
    """A tensor of a type that no float is cast from."""
    stored(call.folder / "ck.safetensors", {"w": torch.ones(4).to(torch.float8_e8m0fnu)})


OPS = [
    Row("an op that does not exist", one_op("trnspose", HEAD), "unknown-op", said("trnspose")),
    Row(
        "an op of nothing like it",
        one_op("zzz", HEAD),
        "unknown-op",
        change("zzz", "transpose", "transpose"),
    ),
    Row("a misspelt parameter", one_op("permute", HEAD, ", dim: [1, 0]"), "unknown-key", said("dim")),
    Row(
        "a part that is not there",
        one_op("chunk", HEAD, ", dim: 0, chunks: 2, take: 2"),
        "op-value",
        lambda call: call.change("take: 2", call.ticked()[0]),
    ),
    Row(
        "a number nobody knows",
        one_op("chunk", HEAD, ", dim: 0, chunks: ranks, take: 0"),
        "unknown-value",
        lambda call: call.add(call.ticked()[0].replace("NUMBER", "2")),
    ),
    Row(
        "a misspelt config key",
        one_op("rotary_permute", "m:model.layers.0.self_attn.q_proj.weight", ", heads: m.config.num_atention_heads"),
        "unknown-value",
        said("m.config.num_atention_heads"),
    ),
    Row(
        "a division with a rest",
        one_op("slice", "m:model.norm.weight", ", dim: 0, start: 1 / 2, stop: 4"),
        "op-value",
        lambda call: call.change("1 / 2", "1 / 2".replace(call.ticked()[1], call.ticked()[0])),
    ),
    Row(
        "an operand that is not there",
        one_op("scale", "m:model.nrom.weight", ", factor: 2"),
        "missing-operand",
        near("m:model.nrom.weight"),
    ),
    Row(
        "an operand that is dropped",
        one_op("scale", "m:model.norm.weight", ", factor: 2") + "drop: [m:model.norm.weight]\n",
        "missing-operand",
        told("take that line out of `drop`", "drop: [m:model.norm.weight]\n", ""),
    ),
    Row(
        "a parameter forgotten",
        one_op("rotary_permute", HEAD),
        "missing-parameter",
        lambda call: call.change("rotary_permute,", f"rotary_permute, {call.ticked()[0].replace('...', '4')},"),
    ),
    Row(
        "new rows made in no known way",
        one_op("new_rows", HEAD, ", rows: 2, new: avg"),
        "op-value",
        change("avg", "mean"),
    ),
    Row(
        "new rows made in a misspelt way",
        one_op("new_rows", HEAD, ", rows: 2, new: meen"),
        "op-value",
        said("meen"),
    ),
    Row(
        "a parameter for another way",
        one_op("new_rows", HEAD, ", rows: 2, new: mean, row: 3"),
        "no-effect",
        lambda call: call.change("new: mean", call.ticked()[0]),
    ),
    Row(
        "a variable that nothing uses",
        GQA.replace("output: out", "output: out\nlet: {ranks: 2}") + REST,
        "unused-variable",
        told("remove it", "let: {ranks: 2}\n", ""),
    ),
    Row(
        "a variable of another name than its formula's",
        GQA.replace("output: out", "output: out\nlet: {chunk: 2}")
        + "  a: {op: chunk, of: m:lm_head.weight, dim: 0, chunks: chunks, take: 0}\n"
        + 'drop: ["m:model.{rest...}"]\n',
        "unused-variable",
        lambda call: call.change("{chunk:", f"{{{call.ticked()[0]}:"),
    ),
    Row(
        "a variable that a preset calls otherwise",
        "sources: {hf: $gqa}\noutput: out\nuse: llama/hf-to-litgpt\nlet: {kv_head: 2}\n",
        "unused-variable",
        lambda call: call.change("kv_head:", f"{call.ticked()[0]}:"),
    ),
    Row(
        "a count inside of an op",
        GQA + '  "old.{rest...}": "m:{rest...}"\n'
        '  "{r}.head": {op: cast, dtype: bf16, '
        'of: {op: chunk, of: "m:lm_head.weight", chunks: 2, take: r, for: {r: 2}}}\n',
        "no-effect",
        told("to the outermost op", ", for: {r: 2}}}", "}, for: {r: 2}}"),
    ),
    Row(
        "two counts of a rule",
        GQA + '  "old.{rest...}": "m:{rest...}"\n'
        '  "{r}.head": [{op: chunk, of: "m:head", chunks: 2, take: r, for: {r: 3}}, '
        '{op: chunk, of: "m:lm_head.weight", chunks: 2, take: r, for: {r: 2}}]\n',
        "op-value",
        told("write the same number in both", "{r: 3}", "{r: 2}"),
    ),
    Row(
        "a count of a million",
        GQA + '  "old.{rest...}": "m:{rest...}"\n'
        '  "{r}.{s}.head": {op: chunk, of: "m:lm_head.weight", chunks: 2, take: 0, for: {r: 999, s: 999}}\n',
        "too-many-targets",
        told("count fewer", "{r: 999, s: 999}", "{r: 2, s: 1}"),
    ),
    Row(
        "tensors that must be equal and are not",
        GQA + '  "old.{rest...}": "m:{rest...}"\n'
        "  made: {op: assert_equal, of: [m:model.norm.weight, m:model.layers.0.input_layernorm.weight]}\n",
        "not-equal",
        told("`op: linear`", "{op: assert_equal, of", "{op: linear, weights: [0.5, 0.5], of"),
    ),
    Row(
        "a sum that cannot be a type",
        mapped(
            "sources: {m: ck.safetensors}\noutput: {path: out, dtype: bf16}\ntensors:\n" + REST,
            before=codes,
        ),
        "cannot-cast",
        lambda call: call.change("dtype: bf16", f"dtype: bf16, {call.ticked()[1]}"),
    ),
]


def back_from(about: str, text: str, follow: Follow, *, away: bool = True, then: str = "") -> Row:
    """A mapping without a way back; its source is away, unless the mapping is to be resolved."""
    return Row(about, mapped(text.replace("$gqa", "nowhere") if away else text, *INVERT), "no-inverse", follow, then)


def here(words: str) -> Follow:
    """Puts the source where the mapping says."""

    def follow(call: Call) -> None:
        assert words in call.hint
        (call.folder / "nowhere").symlink_to(call.world["gqa"])

    return follow


BACK = [
    Row(
        "a way back from a source that is not there",
        mapped(GQA + REST, *INVERT, "--source", "n"),
        "unknown-source",
        argument("n", "m", "known here: m"),
    ),
    Row(
        "a way back from a source that gives nothing alone",
        mapped('sources: {b: nowhere, m: nowhere}\noutput: out\ntensors: {"{rest...}": "m:{rest...}"}\n', *INVERT),
        "no-inverse",
        lambda call: call.args.extend(call.ticked()[0].split()),
    ),
    back_from(
        "a way back of what is left", GQA + "  lm_head.weight: m:lm_head.weight\n" + REST, here("put the sources")
    ),
    back_from(
        "a way back of two candidates", GQA + '  "{rest...}": ["m:x.{rest...}", "m:{rest...}"]\n', here("put the")
    ),
    back_from(
        "a way back of lost zeros",
        GQA + '  "{i:02}.x": "m:layers.{i}.x"\n',
        told("{x:02} on both sides", "layers.{i}.x", "layers.{i:02}.x"),
    ),
    back_from(
        "a way back to a number that was not said",
        GQA + '  "{i}.x": {op: reshape, of: "m:layers.{i}.x", shape: [4]}\n',
        lambda call: call.change("reshape,", f"reshape, {call.ticked()[0].replace('...', '[2, 2]')},"),
    ),
    back_from(
        "a way back of parts of an unknown number",
        "let: {n: 2}\n"
        + GQA
        + '  a: {op: chunk, of: "m:x", chunks: n, take: 0}\n  b: {op: chunk, of: "m:x", chunks: n, take: 1}\n',
        told("as a number", "chunks: n", "chunks: 2"),
    ),
    back_from(
        "a way back of joined sizes",
        GQA + "  a: {op: concat, of: [m:x, m:y]}\n",
        lambda call: call.change("[m:x, m:y]", f"[m:x, m:y], {call.ticked()[0].replace('...', '2, 2')}"),
    ),
]


def two_in_one(call: Call) -> None:
    """Two names that become one."""
    stored(call.folder / "a.safetensors", {"old.1": torch.zeros(1), "new.2": torch.zeros(1)})


BACK += [
    Row(
        "a way back that would bring something wrong",
        mapped(
            'sources: {a: a.safetensors}\noutput: out\ntensors: {"t.{n}": ["a:new.{n}", "a:old.{n}"]}\n',
            *INVERT,
            before=two_in_one,
        ),
        "no-inverse",
        lambda call: setattr(
            call, "args", call.ticked()[-1].replace("MAPPING", "mapping.yaml").replace("NAME", "t.1").split()[1:]
        ),
    ),
]

ROWS = [*OPS, *BACK]
