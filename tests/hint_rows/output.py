"""What is said of the output, of presets and of options; and what stands in the way when it is written."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from shardmerge import api
from tests.following import RUN, Call, Follow, Row, argument, by_hand, change, near, pasted, ran, said
from tests.hint_rows.given import CONVERT, Given, made, mapped, stored, told
from tests.test_mistakes import GQA, REST, XTUNER

LLAMA = "target: {name: hf/llama, text: m}\n"
INIT = ("init",)


def output(keys: str, start: str = "", source: str = "$gqa") -> str:
    return start + GQA.replace("output: out", f"output: {{path: out, {keys}}}").replace("$gqa", source) + REST


def without(*words: str) -> Follow:
    """Leaves arguments out, as the hint says."""

    def follow(call: Call) -> None:
        assert "out" in call.hint, call.hint
        for word in words:
            call.args.remove(word)

    return follow


def done_before(text: str, then: Callable[[Call], object], *args: str) -> Given:
    """A mapping that was carried out, something that happens, and a call."""

    def given(call: Call) -> Sequence[str]:
        call.args = list(mapped(text)(call))
        assert call.attempt() == ()
        then(call)
        return args

    return given


def more(*args: str) -> Follow:
    """Adds the option that the hint begins with, or these."""
    return lambda call: call.args.extend(args or call.hint.replace(",", " ").split()[1:3])


OUTPUT = [
    Row("no output", GQA.replace("output: out\n", "") + REST, "no-output", pasted),
    Row("a name under keep that is not there", output("keep: [model.nrom.weight]"), "keep-matches-nothing",
        near("model.nrom.weight")),
    Row("a name under keep like no other", output("keep: [q0815]"), "keep-matches-nothing",
        lambda call: (call.change(", keep: [q0815]", ""), ran(call))),
    Row("a type that decides nothing", output('dtypes: {"model.{r...}": bf16, model.norm.weight: f32}'), "no-effect",
        told("write it before the others", '{"model.{r...}": bf16, model.norm.weight: f32}',
             '{model.norm.weight: f32, "model.{r...}": bf16}')),
    Row("a type of what is no float", output("dtypes: {ids: bf16}", source="$mixed"), "no-effect",
        told("remove it", ", dtypes: {ids: bf16}", "")),
    Row("a type that does not exist", output("dtype: bf61"), "unknown-dtype", said("bf61")),
    Row("a type that is no float", output("dtype: int8"), "unknown-dtype", told("never cast", ", dtype: int8", "")),
    Row("a size in the unit of memory", output("shard_size: 5GiB"), "bad-size", change("5GiB", "5GB")),
    Row("a vocabulary without a target", GQA.replace("output: out", "output: out\nvocabulary: {rows: 128}") + REST,
        "no-target", lambda call: call.add(call.ticked()[0].replace("SOURCE", "m"))),
    Row("a vocabulary of a model without words",
        "sources: {m: $clip}\noutput: out\ntarget: {name: hf/clip, config: m}\nvocabulary: {rows: 128}\ntensors:\n" + REST,
        "no-effect", told("remove `vocabulary`", "vocabulary: {rows: 128}\n", ""), "unexpected-target"),
    Row("files without a target", output("files: model"), "no-target",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "m"))),
    Row("a config without a target", GQA + REST + "config: {set: {use_cache: false}}\n", "no-config",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "m"))),
    Row("a target that does not exist", "target: {name: hf/lama, text: m}\n" + GQA + REST, "unknown-target",
        said("hf/lama")),
    Row("a target of nothing like it", "target: {name: zzz, text: m}\n" + GQA + REST, "unknown-target",
        change("zzz", "hf/llama")),
    Row("a role that the target does not have", "target: {name: hf/llama, llm: m}\n" + GQA + REST, "unknown-role",
        change("llm: m", "text: m", "text")),
    Row("a misspelt option of the target", "target: {name: hf/llama, text: m, contxt: 64}\n" + GQA + REST,
        "unknown-role", said("contxt")),
    Row("a source without tensors that nobody uses",
        mapped(GQA.replace("m: $gqa", "m: $gqa, c: ck") + REST,
               before=lambda call: ((call.folder / "ck").mkdir(),
                                    shutil.copy(call.world["gqa"] / "config.json", call.folder / "ck"))),
        "unknown-source", told("remove it", ", c: ck", "")),
    Row("a pattern of files that fits nothing", output('files: {include: ["*.zzz"]}', LLAMA), "file-matches-nothing",
        told("remove the pattern", 'include: ["*.zzz"]', "")),
    Row("the config left out", output('files: {exclude: ["*.json"]}', LLAMA), "needed-file",
        told("do not fit config.json", "*.json", "shardmerge*.json"), "file-matches-nothing"),
    Row("a name that no reader takes", GQA.replace("tensors:\n", "tensors:\n  __metadata__: m:model.norm.weight\n") + REST,
        "unusable-name", told("another name", "__metadata__", "metadata")),
]  # fmt: skip

PRESETS = [
    Row("a misspelt preset", XTUNER.replace("llava-to-hf", "llava2hf"), "unknown-preset", said("xtuner/llava2hf")),
    Row("a misspelt source of a preset", XTUNER.replace("trained:", "traind:"), "missing-source",
        lambda call: call.change("traind: ", call.ticked()[1].replace("PATH", ""))),
    Row("a base that the preset does not know", (*CONVERT, "$frozen", "out", "--use", "xtuner/llava-to-hf", "--base",
        "lllm=$llm", "--base", "vision=$clip"), "unknown-source",
        lambda call: call.change("lllm=", f"{call.ticked()[0]}=")),
    Row("a source that the preset has no use for", XTUNER.replace("vision:", "clip: $clip, vision:"), "unknown-source",
        told("known here", "clip: $clip, ", "")),
    Row("a base without a preset", (*CONVERT, "$alone", "out", "--base", "llm=$llm", "--base", "vision=$clip"),
        "no-preset", lambda call: call.args.extend([*call.hint.split()[1:2], "xtuner/llava-to-hf"])),
    Row("a number that the preset has under another name",
        (*CONVERT, "$gqa", "out", "--use", "llama/hf-to-meta", "--let", "rank=2"), "unknown-value",
        lambda call: call.change("rank=2", f"{call.ticked()[0]}=2")),
    Row("a number of nothing like it", (*CONVERT, "$gqa", "out", "--use", "llama/hf-to-meta", "--let", "zzz=2"),
        "unknown-value", argument("zzz=2", "ranks=2", "ranks")),
    Row("a number of a preset that has none", (*CONVERT, "$lora", "out", "--use", "peft/merge", "--base",
        "base=$base", "--let", "n=2"), "unknown-value", without("--let", "n=2")),
    Row("a pair that is none", (*CONVERT, "$lora", "out", "--use", "peft/merge", "--base", "$base"), "bad-pair",
        lambda call: call.args.__setitem__(-1, call.hint.split()[1].rstrip(",").replace("NAME", "base"))),
    Row("names of another layout", (*CONVERT, "$meta", "out", "--use", "llama/litgpt-to-hf"), "another-layout",
        lambda call: call.change("llama/litgpt-to-hf", call.ticked()[0])),
    Row("names that no preset reads", (*CONVERT, "$mixed", "out", "--use", "llama/litgpt-to-hf"), "another-layout",
        without("--use", "llama/litgpt-to-hf")),
    Row("an unknown layout", (*INIT, "$mixed"), "unknown-layout", ran),
    Row("several roads", (*INIT, "$alone"), "several-roads",
        lambda call: call.args.extend(call.hint.splitlines()[1].partition(":")[0].split())),
    Row("a road of a misspelt name", (*INIT, "$alone", "--to", "hf/lava"), "no-road",
        lambda call: call.change("hf/lava", call.ticked()[0])),
    Row("a road of nothing like it", (*INIT, "$alone", "--to", "zzz"), "no-road", argument("zzz", "hf/llava", "hf/llava")),
    Row("a base that the road does not know", (*INIT, "$alone", "--to", "hf/llava", "--base", "lllm=$llm"),
        "unknown-source", lambda call: call.change("lllm=", f"{call.ticked()[0]}=")),
    Row("a base of nothing like it", (*INIT, "$alone", "--to", "hf/llava", "--base", "zzz=$llm"),
        "unknown-source", lambda call: call.change("zzz=", "llm=")),
    Row("a mapping that is there already", made(lambda call: (call.folder / "there.yaml").write_text("x"),
        *INIT, "$meta", "-o", "there.yaml"), "output-exists", argument("there.yaml", "other.yaml", "give another -o")),
]  # fmt: skip

ASKED = [
    Row("a tensor that the plan has not", mapped(GQA + REST, "explain", "mapping.yaml", "--tensor", "model.nrom.weight"),
        "unknown-tensor", near("model.nrom.weight")),
    Row("a tensor of nothing like it", mapped(GQA + REST, "explain", "mapping.yaml", "--tensor", "q0815"),
        "unknown-tensor", ran),
    Row("an option of verify that has no effect", done_before(GQA + REST, str, "verify", "out", "--dtype", "bf16"),
        "no-effect", without("--dtype", "bf16")),
    Row("a mapping that was changed", done_before(GQA + REST, lambda call: call.add("# \n".replace("# ", "let: {}")) or
        call.write(call.mapping.replace("output: out", "output: {path: out, dtype: f16}")),
        "verify", "out", "--sources", "mapping.yaml"), "plan-differs", without("--sources", "mapping.yaml")),
    Row("a directory of another tool", ("verify", "$gqa"), "no-receipt",
        lambda call: setattr(call, "args", ["diff", str(call.world["gqa"]), str(call.world["gqa"])])),
    Row("a damaged result", done_before(GQA + REST, lambda call: flip(call.folder / "out/model.safetensors"),
        "verify", "out", "-q"), "checksum-differs", by_hand("convert again", lambda call: again(call))),
    Row("a result whose config was changed", done_before(LLAMA.replace("llama", "model") + GQA + REST,
        lambda call: other_config(call.folder / "out"), "verify", "out", "-q"), "config-disagrees",
        by_hand("convert again", lambda call: again(call)), words="convert again"),
]  # fmt: skip


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_config(folder: Path) -> None:
    """A config.json of more layers, with a receipt that has its digest: as after an edit by another tool."""
    path = folder / "config.json"
    text = json.dumps(json.loads(path.read_text()) | {"vocab_size": 99})
    path.write_text(text)
    receipt = json.loads((folder / "shardmerge.json").read_text())
    receipt["side_files"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "shardmerge.json").write_text(json.dumps(receipt))


def again(call: Call) -> None:
    """Removes the result and converts again."""
    shutil.rmtree(call.folder / "out")
    verify, call.args = call.args, list(RUN)
    assert call.attempt() == ()
    call.args = verify


# --- what stands in the way ---


def mended(call: Call) -> None:
    """Ends the faults."""
    call.faults.close()


def faulty(patch: Callable[[], mock._patch], *args: str) -> Given:  # type: ignore[type-arg]
    return made(lambda call: call.faults.enter_context(patch()), *args)


def small_files(call: Call) -> None:
    """Lets the system refuse files of more than 4 KiB, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def any_files(call: Call) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def changing(call: Call) -> None:
    """Somebody writes to the source between plan and copy, once."""
    shutil.copytree(call.world["gqa"], call.folder / "ck")
    carry_out = api.carry_out

    def once(*args: object, **named: object) -> object:
        api.carry_out = carry_out
        os.utime(call.folder / "ck/model.safetensors")
        return carry_out(*args, **named)  # type: ignore[arg-type]

    api.carry_out = once  # type: ignore[assignment]


def staged(call: Call) -> None:
    """The staging directory of a run elsewhere."""
    prepared = api.prepare_conversion(call.world["gqa"])
    folder = call.folder / f"out.partial-{prepared.plan.id[:16]}"
    folder.mkdir()
    (folder / ".owner.json").write_text(json.dumps({"host": "elsewhere", "pid": 1}))


FAULTS = [
    Row("an output that is there", made(lambda call: stored(call.folder / "out/model.safetensors", {"w": torch.ones(1)}),
        *CONVERT, "$gqa", "out"), "output-exists", argument("out", "out2", "choose another path")),
    Row("an output that is there, to be removed", made(lambda call: stored(call.folder / "out/model.safetensors",
        {"w": torch.ones(1)}), *CONVERT, "$gqa", "out"), "output-exists",
        by_hand("remove it first", lambda call: shutil.rmtree(call.folder / "out"))),
    Row("an output over its source", made(lambda call: shutil.copytree(call.world["gqa"], call.folder / "ck"),
        *CONVERT, "ck", "ck"), "output-is-source", lambda call: call.args.__setitem__(-1, "out")),
    Row("a run that is at work", made(staged, *CONVERT, "$gqa", "out"), "output-busy",
        by_hand("remove the directory", lambda call: [shutil.rmtree(path) for path in call.folder.glob("out.partial-*")])),
    Row("a disk without room", faulty(lambda: mock.patch("shardmerge.publish.free_bytes", lambda path: 0),
        *CONVERT, "$gqa", "out"), "disk-too-small", by_hand("free some space", mended)),
    Row("a disk that is full", made(small_files, *CONVERT, "$gqa", "out"), "disk-full",
        by_hand("free some space", any_files)),
    Row("a source that changes", made(changing, *CONVERT, "ck", "out"), "source-changed",
        by_hand("run again", lambda call: None)),
    Row("too little memory", (*CONVERT, "$gqa", "out", "--dtype", "f32", "--max-memory", "1MiB"), "memory-budget",
        lambda call: call.args.extend(call.hint.split()[2:])),
    Row("a device without its library", faulty(lambda: mock.patch.dict(sys.modules, {"torch": None}),
        *CONVERT, "$gqa", "out", "--device", "cuda", "--dtype", "f32"), "device-unavailable",
        lambda call: (mended(call), without("--device", "cuda")(call))),
    Row("a device that is not there", faulty(lambda: mock.patch("torch.cuda.is_available", lambda: False),
        *CONVERT, "$gqa", "out", "--device", "cuda", "--dtype", "f32"), "device-unavailable",
        lambda call: (mended(call), without("--device", "cuda")(call))),
    Row("a header that is too large", faulty(lambda: mock.patch("shardmerge.targets.shards._LARGEST_HEADER", 4096),
        *CONVERT, "$clip", "out"), "header-too-large",
        lambda call: call.args.extend([call.hint.split()[-1], "20KB"])),
    Row("a shape that torch cannot hold", made(lambda call: huge(call), *CONVERT, "ck.safetensors", "out", "--format",
        "bin"), "shape-too-large", argument("bin", "safetensors", "write safetensors")),
]  # fmt: skip


def huge(call: Call) -> None:
    """A safetensors file with an empty tensor that torch cannot make."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}}).encode()
    (call.folder / "ck.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def hidden(call: Call) -> None:
    """An environment whose transformers cannot be found, for the child that loads the model."""
    (call.folder / "hidden/transformers").mkdir(parents=True)
    (call.folder / "hidden/transformers/__init__.py").write_text(
        "raise ModuleNotFoundError('No module named transformers')"
    )
    call.faults.enter_context(mock.patch.dict(os.environ, {"PYTHONPATH": str(call.folder / "hidden")}))


ENVIRONMENT = [
    Row("an environment without transformers", done_before(LLAMA + GQA + REST, hidden, "verify", "out", "--load", "-q"),
        "no-transformers", by_hand("pip install shardmerge[transformers]", mended)),
    Row("a benchmark of next to nothing", ("bench", "--size", "1KB", "--rounds", "1"), "bad-size",
        lambda call: call.args.extend(call.hint.replace(",", "").split()[:2])),
    Row("a benchmark of more than the disk", ("bench", "--size", "999TB", "--rounds", "1"), "disk-too-small",
        argument("999TB", "17MiB", "a smaller --size")),
]  # fmt: skip

ROWS = [*ENVIRONMENT, *OUTPUT, *PRESETS, *ASKED, *FAULTS]
