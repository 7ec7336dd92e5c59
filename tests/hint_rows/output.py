"""What is said of the output, of presets and of options; and what stands in the way when it is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch

from benchmarks.synthetic import write_zero
from tests.following import Call, Follow, Given, Row, change, near, pasted, ran, said
from tests.hint_rows.given import CONVERT, ZERO, copied, mapped, told, without
from tests.test_mistakes import GQA, REST

LLAMA = "target: {name: hf/llama, text: m}\n"
INIT = ("init",)
UNIVERSAL = ("--format", "zero-universal", "--with-optimizer")


def output(keys: str, start: str = "", source: str = "$gqa") -> str:
    return start + GQA.replace("output: out", f"output: {{path: out, {keys}}}").replace("$gqa", source) + REST


def trained(name: str, **settings: object) -> Given:
    """A run of ZeRO-3 that trained one weight, with these settings of its optimizer; to be gone on with by torch."""

    def given(call: Call) -> Sequence[str]:
        tag = write_zero(call.folder / "ck", {name: (7, 5)}, stage=3, world=2, fill=True)
        for path in tag.glob("*_optim_states.pt"):
            root = torch.load(path, weights_only=True)
            base = root["optimizer_state_dict"]["optimizer_state_dict"]
            base["param_groups"] = [{"lr": 0.01, "betas": (0.9, 0.999), "params": [0], **settings}]
            torch.save(root, path)
        return [*CONVERT, "ck", "out", "--format", "dcp", "--with-optimizer"]

    return given


def more(*args: str) -> Follow:
    """Adds the option that the hint begins with, or these."""
    return lambda call: call.args.extend(args or call.hint.replace(",", " ").split()[1:3])


OUTPUT = [
    Row("no output", GQA.replace("output: out\n", "") + REST, "no-output", pasted),
    Row(
        "a name under keep that is not there",
        output("keep: [model.nrom.weight]"),
        "keep-matches-nothing",
        near("model.nrom.weight"),
    ),
    Row(
        "a name under keep like no other",
        output("keep: [q0815]"),
        "keep-matches-nothing",
        lambda call: (call.change(", keep: [q0815]", ""), ran(call)),
    ),
    Row(
        "a type that decides nothing",
        output('dtypes: {"model.{r...}": bf16, model.norm.weight: f32}'),
        "no-effect",
        told(
            "write it before the others",
            '{"model.{r...}": bf16, model.norm.weight: f32}',
            '{model.norm.weight: f32, "model.{r...}": bf16}',
        ),
    ),
    Row(
        "a type of what is no float",
        output("dtypes: {ids: bf16}", source="$mixed"),
        "no-effect",
        told("remove it", ", dtypes: {ids: bf16}", ""),
    ),
    Row("a type that does not exist", output("dtype: bf61"), "unknown-dtype", said("bf61")),
    Row("a type that is no float", output("dtype: int8"), "unknown-dtype", said("int8")),
    Row("a size in the unit of memory", output("shard_size: 5GiB"), "bad-size", said("5GiB")),
    Row(
        "a vocabulary without a target",
        GQA.replace("output: out", "output: out\nvocabulary: {rows: 128}") + REST,
        "no-target",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "m")),
    ),
    Row(
        "a vocabulary of a model without words",
        "sources: {m: $clip}\noutput: out\ntarget: {name: hf/clip, config: m}\nvocabulary: {rows: 128}\ntensors:\n"
        + REST,
        "no-effect",
        told("remove `vocabulary`", "vocabulary: {rows: 128}\n", ""),
        "unexpected-target",
    ),
    Row(
        "files without a target",
        output("files: model"),
        "no-target",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "m")),
    ),
    Row(
        "a config without a target",
        GQA + REST + "config: {set: {use_cache: false}}\n",
        "no-config",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "m")),
    ),
    Row(
        "a target that does not exist",
        "target: {name: hf/lama, text: m}\n" + GQA + REST,
        "unknown-target",
        said("hf/lama"),
    ),
    Row(
        "a target of nothing like it",
        "target: {name: zzz, text: m}\n" + GQA + REST,
        "unknown-target",
        change("zzz", "hf/llama"),
    ),
    Row(
        "a role that the target does not have",
        "target: {name: hf/llama, llm: m}\n" + GQA + REST,
        "unknown-role",
        change("llm: m", "text: m", "text"),
    ),
    Row(
        "a misspelt option of the target",
        "target: {name: hf/llama, text: m, contxt: 64}\n" + GQA + REST,
        "unknown-role",
        said("contxt"),
    ),
    Row(
        "a source without tensors that nobody uses",
        mapped(
            GQA.replace("m: $gqa", "m: $gqa, c: ck") + REST,
            before=lambda call: (
                (call.folder / "ck").mkdir(),
                shutil.copy(call.world["gqa"] / "config.json", call.folder / "ck"),
            ),
        ),
        "unknown-source",
        told("remove it", ", c: ck", ""),
    ),
    Row(
        "a pattern of files that fits nothing",
        output('files: {include: ["*.zzz"]}', LLAMA),
        "file-matches-nothing",
        told("remove the pattern", 'include: ["*.zzz"]', ""),
    ),
    Row(
        "the config left out",
        output('files: {exclude: ["*.json"]}', LLAMA),
        "needed-file",
        told("do not fit config.json", "*.json", "shardmerge*.json"),
        "file-matches-nothing",
    ),
    Row(
        "keys of a state dict around files that have none",
        output("root: model"),
        "no-effect",
        told("write `format: dcp`", "root: model", "root: model, format: dcp"),
    ),
    Row(
        "keys of a state dict for another format",
        copied("gqa", "--dcp-root", "model"),
        "no-effect",
        more("--format", "dcp"),
    ),
    Row(
        "transformers asked of a checkpoint for training",
        copied("gqa", "--format", "dcp", "--check", "transformers"),
        "no-effect",
        without("--check", "transformers"),
    ),
    Row(
        "sixteen bits for an optimizer",
        output("format: zero-universal, dtype: bf16"),
        "unfit-dtype",
        told("leave the dtype out", ", dtype: bf16", ""),
    ),
    Row(
        "a name that is no folder",
        (GQA + '  "a/b": m:model.norm.weight\n').replace("output: out", "output: {path: out, format: zero-universal}")
        + REST,
        "unusable-name",
        told("another name", '"a/b"', '"a.b"'),
    ),
    Row(
        "an optimizer for a format that has no place for it",
        copied(ZERO / "llama_z2_w2_bf16/ckpt", "--with-optimizer"),
        "no-effect",
        more("--format", "zero-universal"),
    ),
    Row(
        "an optimizer for rules",
        copied(ZERO / "llama_z2_w2_bf16/ckpt", *UNIVERSAL, "--use", "llama/hf-to-hf"),
        "no-effect",
        without("--with-optimizer"),
        "missing-source",
    ),
    Row("an optimizer of a published model", copied("gqa", *UNIVERSAL), "no-moments", without("--with-optimizer")),
    Row(
        "an optimizer that is kept otherwise",
        copied(ZERO / "elastic_z2_w2_bf16/ckpt", *UNIVERSAL),
        "no-moments",
        without("--with-optimizer"),
    ),
    Row("an optimizer that does not say its decay", trained("w", eps=1e-8), "no-moments", without("--with-optimizer")),
    Row(
        "a weight whose settings have the name of a group's",
        trained("0", eps=1e-8, weight_decay=0.0),
        "unusable-name",
        without("--with-optimizer"),
    ),
    Row(
        "a name that no reader takes",
        GQA.replace("tensors:\n", "tensors:\n  __metadata__: m:model.norm.weight\n") + REST,
        "unusable-name",
        told("another name", "__metadata__", "metadata"),
    ),
]

ROWS = [*OUTPUT]
