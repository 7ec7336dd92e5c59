"""The rows of tests/test_hints.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import GOLDEN
from tests.following import Call, Follow, Row, by_hand, change, near, option, pasted, said, under
from tests.test_mistakes import ALL_LLM, GQA, LORA, REST, XTUNER, one_op

ZERO = GOLDEN / "zero"
LAYOUTS = GOLDEN / "layouts"
CONVERT = ("convert", "--no-sync", "-q")
ONLY = 'drop: ["m:model.{rest...}"]\n'


def copied(
    source: Path, *args: str, without: str = "", then: Callable[[Path], object] = str
) -> Callable[[Call], Sequence[str]]:
    """A copy of a checkpoint as ``ck``, some of it gone or changed, and a conversion of it."""

    def given(call: Call) -> Sequence[str]:
        shutil.copytree(source, call.folder / "ck")
        if without:
            gone = [path for path in sorted((call.folder / "ck").rglob(without)) if path.is_file()]
            assert gone
            (call.folder / "aside").mkdir()
            for path in gone:
                shutil.move(path, call.folder / "aside")
        then(call.folder / "ck")
        return [*CONVERT, "ck", "out", *args]

    return given


def back(folder: str) -> Callable[[Call], object]:
    """Brings what was left behind."""

    def do(call: Call) -> None:
        for path in (call.folder / "aside").iterdir():
            shutil.move(path, call.folder / folder)

    return do


def files(args: Sequence[str], **tensors: object) -> Callable[[Call], Sequence[str]]:
    """Files of one kind or the other by their names (``a_pth``), and a call."""

    def given(call: Call) -> Sequence[str]:
        for name, value in tensors.items():
            stem, _, suffix = name.rpartition("_")
            path = call.folder / f"{stem}.{suffix}"
            if suffix == "safetensors":
                save_file(value, path)
            else:
                torch.save(value, path)
        return args

    return given


def truncated(name: str) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        path = next(folder.rglob(name))
        aside = folder.parent / "aside"
        aside.mkdir()
        shutil.copy(path, aside)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size * 2 // 3)

    return do


def again(folder: str = "ck") -> Callable[[Call], object]:
    """Copies the whole file again."""

    def do(call: Call) -> None:
        for path in (call.folder / "aside").iterdir():
            shutil.copy(path, next((call.folder / folder).rglob(path.name)))

    return do


def edited(name: str, **values: object) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return do


MAPPING = [
    Row(
        "a tensor that no rule takes",
        GQA + '  "model.{rest...}": "m:model.{rest...}"\n',
        "unmatched-source",
        under("drop"),
    ),
    Row(
        "a misspelt tensor", GQA + "  head: m:lm_haed.weight\n" + ONLY, "rule-matches-nothing", near("m:lm_haed.weight")
    ),
    Row(
        "a misspelt source",
        'sources: {trained: $gqa}\noutput: out\ntensors:\n  "{rest...}": "traned:{rest...}"\n',
        "unknown-source",
        said("traned"),
    ),
    Row(
        "a name without its source",
        GQA + '  "{rest...}": "{rest...}"\n',
        "no-source",
        change('": "{rest...}"', '": "m:{rest...}"', "m:{rest...}"),
    ),
    Row(
        "braces without quotes",
        GQA + "  {rest...}: m:{rest...}\n",
        "yaml-key",
        change("  {rest...}: m:", '  "{rest...}": m:', '"{rest...}": src:{rest...}'),
        "yaml-syntax",
    ),
    Row(
        "a drop that matches nothing",
        GQA + REST + 'drop: ["m:model.layers.0.self_attn.vproj.weight"]\n',
        "drop-matches-nothing",
        near("m:model.layers.0.self_attn.vproj.weight"),
    ),
    Row("a misspelt key", GQA.replace("tensors:", "tensor:") + REST, "unknown-key", said("tensor")),
    Row(
        "a name the target does not have",
        "target: {name: hf/llama, text: m}\n" + GQA + REST + "  lm_head.bias: m:model.norm.weight\n",
        "unexpected-target",
        change("  lm_head.bias: m:model.norm.weight\n", "", "remove the rule `lm_head.bias`"),
    ),
    Row("an op that does not exist", one_op("trnspose", "m:lm_head.weight"), "unknown-op", said("trnspose")),
    Row(
        "a misspelt parameter",
        one_op("permute", "m:lm_head.weight", ", dim: [1, 0]"),
        "unknown-key",
        said("dim:".rstrip(":")),
    ),
    Row(
        "a part that is not there",
        one_op("chunk", "m:lm_head.weight", ", dim: 0, chunks: 2, take: 2"),
        "op-value",
        change("take: 2", "take: 0", "counted from 0"),
    ),
    Row(
        "a number nobody knows",
        one_op("chunk", "m:lm_head.weight", ", dim: 0, chunks: ranks, take: 0"),
        "unknown-value",
        lambda call: call.add(call.ticked()[0].replace("NUMBER", "2")),
    ),
    Row(
        "a division with a rest",
        one_op("slice", "m:model.norm.weight", ", dim: 0, start: 1 / 2, stop: 4"),
        "op-value",
        change("1 / 2", "1 // 2", "// divides without a rest"),
    ),
    Row(
        "an operand that is not there",
        one_op("scale", "m:model.nrom.weight", ", by: 2"),
        "missing-operand",
        near("m:model.nrom.weight"),
    ),
    Row(
        "a parameter forgotten",
        one_op("rotary_permute", "m:lm_head.weight"),
        "missing-parameter",
        lambda call: call.change("rotary_permute,", f"rotary_permute, {call.ticked()[0].replace('...', '4')},"),
    ),
    Row(
        "new rows made in no known way",
        one_op("new_rows", "m:lm_head.weight", ", rows: 2, how: avg"),
        "op-value",
        change("avg", "mean"),
    ),
    Row(
        "a variable that nothing uses",
        GQA.replace("output: out", "output: out\nlet: {chunk: 2}")
        + "  a: {op: chunk, of: m:lm_head.weight, dim: 0, chunks: chunks, take: 0}\n"
        + ONLY,
        "unused-variable",
        said("chunk:".rstrip(":")) if False else change("let: {chunk: 2}", "let: {chunks: 2}", "`chunks`"),
    ),
    Row(
        "a vocabulary without a target",
        GQA.replace("output: out", "output: out\nvocabulary: {rows: 128}") + REST,
        "no-target",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "m")),
    ),
    Row(
        "fewer rows than the model has",
        "sources: {llm: $llm}\noutput: out\ntarget: {name: hf/llama, text: llm}\nvocabulary: {rows: 100}\n" + ALL_LLM,
        "vocabulary-rows",
        lambda call: call.change("vocabulary: {rows: 100}", call.hint),
    ),
    Row(
        "a target that does not exist",
        "target: {name: hf/lama, text: m}\n" + GQA + REST,
        "unknown-target",
        said("hf/lama"),
    ),
    Row(
        "a role that the target does not have",
        "target: {name: hf/llama, llm: m}\n" + GQA + REST,
        "unknown-role",
        change("llm: m", "text: m", "text"),
    ),
    Row(
        "keep of a name that is not there",
        GQA.replace("output: out", "output: {path: out, keep: [model.nrom.weight]}") + REST,
        "keep-matches-nothing",
        change("model.nrom.weight", "model.norm.weight"),
    ),
    Row(
        "a type that does not exist",
        GQA.replace("output: out", "output: {path: out, dtype: bf61}") + REST,
        "unknown-dtype",
        said("bf61"),
    ),
    Row(
        "a type that is no float",
        GQA.replace("output: out", "output: {path: out, dtype: int8}") + REST,
        "unknown-dtype",
        change("int8", "bfloat16", "never cast"),
    ),
    Row(
        "a format that does not exist",
        GQA.replace("output: out", "output: {path: out, format: gguf}") + REST,
        "unknown-format",
        change("gguf", "bin"),
    ),
    Row(
        "a size in the unit of memory",
        GQA.replace("output: out", "output: {path: out, shard_size: 5GiB}") + REST,
        "bad-size",
        change("5GiB", "5GB"),
    ),
    Row("no output", GQA.replace("output: out\n", "") + REST, "no-output", pasted),
    Row(
        "a misspelt path",
        GQA.replace("$gqa", "$world/linaer.safetensors") + REST,
        "missing-path",
        lambda call: call.change(
            f"{call.world['world']}/linaer.safetensors", call.hint.removeprefix("did you mean ").rstrip("?")
        ),
    ),
    Row(
        "a view that does not exist",
        "sources: {m: {path: $zero, view: fp16}}\noutput: out\ntensors:\n" + REST,
        "unknown-view",
        change("fp16", "module"),
    ),
    Row(
        "no version",
        "sources: {m: $gqa}\n",
        "no-rules",
        lambda call: call.add(call.ticked()[0].replace("PRESET", "llama/hf-to-hf")),
        "missing-source",
    ),
]

ROWS = [*MAPPING]

# Code, words of the hint, and why nobody can follow it.
NOTHING_TO_DO: list[tuple[str, str, str]] = []
