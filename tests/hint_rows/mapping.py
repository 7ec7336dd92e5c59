"""Mistakes in the text of a mapping: YAML, keys, values, templates."""

from __future__ import annotations

from tests.following import Row, change, pasted, said
from tests.hint_rows.given import mapped, raw, told
from tests.test_mistakes import GQA, REST, one_op

ONLY = 'drop: ["m:model.{rest...}"]\n'
LLAMA = "target: {name: hf/llama, text: m}\n"


TEXT = [
    Row("no version", raw("sources: {m: $gqa}\noutput: out\ntensors:\n" + REST), "no-version", pasted),
    Row(
        "a version of the future",
        raw("shardmerge: 2\n" + GQA + REST),
        "unknown-version",
        lambda call: call.change("shardmerge: 2", call.ticked()[0]),
    ),
    Row(
        "no sources",
        "output: out\ntensors: {a: m:b}\n",
        "no-sources",
        lambda call: call.add(call.ticked()[0].replace("PATH", str(call.world["gqa"]))),
        "unknown-source",
    ),
    Row(
        "a source of a bad name",
        'sources: {"my model": $gqa}\noutput: out\nuse: peft/merge\n',
        "bad-source-name",
        said('"my model"'),
        "missing-source unknown-source",
    ),
    Row(
        "a source without a path",
        "sources: {m: {view: fp32}}\noutput: out\ntensors:\n" + REST,
        "no-path",
        lambda call: call.change("view: fp32", call.ticked()[0].replace("PATH", str(call.world["gqa"]))),
    ),
    Row(
        "an output without a path",
        GQA.replace("output: out", "output: {dtype: bf16}") + REST,
        "no-path",
        lambda call: call.change("dtype: bf16", f"dtype: bf16, {call.ticked()[0]}"),
    ),
    Row(
        "a view that does not exist",
        "sources: {m: {path: $zero, view: fp16}}\noutput: out\ntensors:\n" + REST,
        "unknown-view",
        lambda call: call.change("view: fp16", call.ticked()[0]),
    ),
    Row(
        "no rules at all",
        "sources: {m: $gqa}\noutput: out\n",
        "no-rules",
        lambda call: call.add(call.ticked()[0].replace("PRESET", "llama/hf-to-meta")),
        "missing-source unknown-source",
    ),
    Row("a misspelt key", GQA.replace("tensors:", "tensor:") + REST, "unknown-key", said("tensor")),
    Row(
        "a key of nothing like it",
        GQA.replace("output: out", "output: {path: out, zzz: 1}") + REST,
        "unknown-key",
        change("zzz: 1", "dtype: bf16", "dtype"),
    ),
    Row(
        "files of no known kind",
        LLAMA + GQA.replace("output: out", "output: {path: out, files: some}") + REST,
        "unknown-files",
        lambda call: call.change("files: some", call.ticked()[0]),
    ),
    Row(
        "a format that does not exist",
        GQA.replace("output: out", "output: {path: out, format: gguf}") + REST,
        "unknown-format",
        lambda call: call.change("format: gguf", call.ticked()[1]),
    ),
    Row(
        "a list that is none",
        GQA.replace("output: out", "output: {path: out, keep: model.norm.weight}") + REST,
        "wrong-kind",
        lambda call: call.change("keep: model.norm.weight", call.ticked()[0].replace("...", "model.norm.weight")),
    ),
    Row(
        "a target without a name",
        "target: {text: m}\n" + GQA + REST,
        "no-target-name",
        lambda call: call.change("{text: m}", f"{{{call.ticked()[0]}, text: m}}"),
    ),
    Row(
        "a rule without candidates",
        GQA + '  "{rest...}": []\n',
        "no-candidates",
        lambda call: call.change("[]", call.ticked()[0]),
    ),
    Row(
        "a `for` that counts nothing",
        GQA + '  "{rest...}": {op: cast, of: "m:{rest...}", dtype: bf16, for: {r: 2}}\n',
        "no-effect",
        told("remove it from `for`", ", for: {r: 2}", ""),
    ),
    Row(
        "a formula on the wrong side",
        GQA + '  "old.{i}.w": "m:model.layers.{i + j}.mlp.up_proj.weight"\n',
        "bad-formula",
        told(
            "on the side of the target",
            '"old.{i}.w": "m:model.layers.{i + j}.mlp.up_proj.weight"',
            '"old.{i + 1}.w": "m:model.layers.{i}.mlp.up_proj.weight"',
        ),
        "unmatched-source",
    ),
    Row(
        "braces without quotes in a list",
        GQA + '  "model.{rest...}": [m:model.{rest...}, "m:{rest...}"]\n' + "  lm_head.weight: m:lm_head.weight\n",
        "yaml-syntax",
        told('["trained:{rest...}", ', "[m:model.{rest...}", '["m:model.{rest...}"'),
    ),
    Row(
        "braces without quotes in a list, of a short name",
        GQA + '  "{rest}": [{rest}]\n',
        "wrong-kind",
        told('["trained:{rest...}", ', "[{rest}]", '["m:{rest}"]'),
        "rule-matches-nothing unmatched-source",
    ),
    Row(
        "an op without its name",
        GQA + '  "{rest...}": {of: "m:{rest...}", dtype: bf16}\n',
        "wrong-kind",
        told("{op: NAME, of: source:name}", "{of:", "{op: cast, of:"),
    ),
    Row(
        "braces without quotes",
        GQA + "  {rest...}: m:{rest...}\n",
        "yaml-key",
        change("  {rest...}: m:", '  "{rest...}": m:', '"{rest...}": src:{rest...}'),
    ),
    Row(
        "a name that is no name of a number",
        "let: {n-heads: 4}\n" + one_op("rotary_permute", "m:lm_head.weight", ", heads: n_heads"),
        "bad-name",
        said("n-heads"),
    ),
    Row(
        "an anchor", GQA.replace("output: out", "output: &o out") + REST, "yaml-anchor", change("&o out", "out", "out")
    ),
    Row(
        "two documents",
        GQA + REST + "---\na: b\n",
        "yaml-several-documents",
        told("the second `---`", "---\na: b\n", ""),
    ),
    Row(
        "a key twice",
        GQA + REST + '  "{rest...}": "m:{rest...}"\n',
        "duplicate-key",
        told("keep one of them", REST + REST, REST),
    ),
    Row(
        "a mapping of a million characters",
        mapped(GQA + REST + "# " + "a" * (4 << 20)),
        "yaml-too-large",
        lambda call: call.write(call.mapping.partition("# ")[0]),
    ),
    Row(
        "two captures side by side",
        GQA + '  "{a}x{b}": "m:{a}x{b}"\n',
        "ambiguous-segment",
        told("{i:int}", "{b}", "{b:int}"),
        "rule-matches-nothing unmatched-source",
    ),
    Row(
        "a mapping of a misspelt name",
        mapped(GQA + REST, "run", "maping.yaml", "--no-sync", "-q"),
        "missing-path",
        said("maping.yaml"),
    ),
    Row(
        "a mapping of quite another name",
        mapped(GQA + REST, "run", "zzz.yml", "--no-sync", "-q"),
        "missing-path",
        lambda call: call.change("zzz.yml", call.hint.partition("known here: ")[2]),
    ),
]

WORDS = LLAMA + GQA + REST
VOCABULARY = [
    Row(
        "a vocabulary made in no known way",
        WORDS + "vocabulary: {rows: 128, new: random}\n",
        "op-value",
        told("one of mean, zeros, copy, normal", "random", "normal"),
    ),
    Row(
        "a padding token without tokens",
        WORDS + 'vocabulary: {rows: 128, pad: "<pad>"}\n',
        "no-effect",
        told("or remove `pad`", ', pad: "<pad>"', ""),
    ),
    Row(
        "a vocabulary that stays as it is",
        WORDS + "vocabulary: {new: zeros}\n",
        "no-effect",
        told("add one of them", "{new: zeros}", "{new: zeros, rows: 128}"),
    ),
    Row(
        "a seed for what is no chance",
        WORDS + "vocabulary: {rows: 128, seed: 3}\n",
        "no-effect",
        lambda call: call.change("seed: 3", f"seed: 3, {call.ticked()[1]}"),
    ),
]

ROWS = [*TEXT, *VOCABULARY]
