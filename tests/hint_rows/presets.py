"""What is said of presets, of roads to other layouts, and of options."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.following import RUN, Call, Row, argument, by_hand, near, ran, said
from tests.hint_rows.given import CONVERT, LAYOUTS, done_before, made, mapped, told, without
from tests.hint_rows.output import INIT, LLAMA
from tests.receipts import receipt_of, write_receipt
from tests.test_mistakes import GQA, REST, XTUNER


def anew(call: Call) -> None:
    """Converts again, with the two options of the hint, in place of the result."""
    verify, call.args = call.args, [*RUN, "--overwrite", "--fresh"]
    assert call.attempt() == ()
    call.args = verify


def again(call: Call) -> None:
    """Removes the result and converts again."""
    shutil.rmtree(call.folder / "out")
    verify, call.args = call.args, list(RUN)
    assert call.attempt() == ()
    call.args = verify


def open_clip_alone(call: Call) -> Sequence[str]:
    """The weights without the config beside them."""
    shutil.copy(call.world["openclip"] / "open_clip_pytorch_model.bin", call.folder / "ck.bin")
    return *CONVERT, "ck.bin", "out", "--use", "clip/open-clip-to-hf"


PRESETS = [
    Row("a misspelt preset", XTUNER.replace("llava-to-hf", "llava2hf"), "unknown-preset", said("xtuner/llava2hf")),
    Row(
        "a misspelt source of a preset",
        XTUNER.replace("trained:", "traind:"),
        "missing-source",
        lambda call: call.change("traind: ", call.ticked()[1].replace("PATH", "")),
    ),
    Row(
        "a base that the preset does not know",
        (*CONVERT, "$frozen", "out", "--use", "xtuner/llava-to-hf", "--base", "lllm=$llm", "--base", "vision=$clip"),
        "unknown-source",
        lambda call: call.change("lllm=", f"{call.ticked()[0]}="),
    ),
    Row(
        "a source that the preset has no use for",
        XTUNER.replace("vision:", "clip: $clip, vision:"),
        "unknown-source",
        told("known here", "clip: $clip, ", ""),
    ),
    Row(
        "a base that a preset needs, on the command line",
        (*CONVERT, "$lora", "out", "--use", "peft/merge"),
        "missing-source",
        lambda call: call.args.extend(call.hint.removeprefix("add ").replace("PATH", str(call.world["base"])).split()),
    ),
    Row(
        "a CLIP that nothing describes, on the command line",
        open_clip_alone,
        "missing-source",
        lambda call: call.args.extend(
            (call.hint.partition("'<")[0] + str(LAYOUTS / "open_clip_published/truth")).split()
        ),
    ),
    Row(
        "a base without a preset",
        (*CONVERT, "$alone", "out", "--base", "llm=$llm", "--base", "vision=$clip"),
        "no-preset",
        lambda call: call.args.extend([*call.hint.split()[1:2], "xtuner/llava-to-hf"]),
    ),
    Row(
        "a number that the preset has under another name",
        (*CONVERT, "$gqa", "out", "--use", "llama/hf-to-meta", "--let", "rank=2"),
        "unknown-value",
        lambda call: call.change("rank=2", f"{call.ticked()[0]}=2"),
    ),
    Row(
        "a number of nothing like it",
        (*CONVERT, "$gqa", "out", "--use", "llama/hf-to-meta", "--let", "zzz=2"),
        "unknown-value",
        argument("zzz=2", "ranks=2", "ranks"),
    ),
    Row(
        "a number of a preset that has none",
        (*CONVERT, "$lora", "out", "--use", "peft/merge", "--base", "base=$base", "--let", "n=2"),
        "unknown-value",
        without("--let", "n=2"),
    ),
    Row(
        "a pair that is none",
        (*CONVERT, "$lora", "out", "--use", "peft/merge", "--base", "$base"),
        "bad-pair",
        lambda call: call.args.__setitem__(-1, call.hint.split()[1].rstrip(",").replace("NAME", "base")),
    ),
    Row(
        "names of another layout",
        (*CONVERT, "$meta", "out", "--use", "llama/litgpt-to-hf"),
        "another-layout",
        lambda call: call.change("llama/litgpt-to-hf", call.ticked()[0]),
    ),
    Row(
        "names that no preset reads",
        (*CONVERT, "$mixed", "out", "--use", "llama/litgpt-to-hf"),
        "another-layout",
        without("--use", "llama/litgpt-to-hf"),
    ),
    Row(
        "several roads",
        (*INIT, "$alone"),
        "ambiguous-conversion",
        lambda call: call.args.extend(call.hint.splitlines()[1].partition(":")[0].split()),
    ),
    Row(
        "a road of a misspelt name",
        (*INIT, "$alone", "--to", "hf/lava"),
        "no-conversion",
        lambda call: call.change("hf/lava", call.ticked()[0]),
    ),
    Row(
        "a road of nothing like it",
        (*INIT, "$alone", "--to", "zzz"),
        "no-conversion",
        argument("zzz", "hf/llava", "hf/llava"),
    ),
    Row(
        "a base that the road does not know",
        (*INIT, "$alone", "--to", "hf/llava", "--base", "lllm=$llm"),
        "unknown-source",
        lambda call: call.change("lllm=", f"{call.ticked()[0]}="),
    ),
    Row(
        "a base of nothing like it",
        (*INIT, "$alone", "--to", "hf/llava", "--base", "zzz=$llm"),
        "unknown-source",
        lambda call: call.change("zzz=", "llm="),
    ),
    Row(
        "a mapping that is there already",
        made(lambda call: (call.folder / "there.yaml").write_text("x"), *INIT, "$meta", "-o", "there.yaml"),
        "output-exists",
        argument("there.yaml", "other.yaml", "name another file"),
    ),
]

ASKED = [
    Row(
        "a tensor that the plan has not",
        mapped(GQA + REST, "explain", "mapping.yaml", "--tensor", "model.nrom.weight"),
        "unknown-tensor",
        near("model.nrom.weight"),
    ),
    Row(
        "a tensor of nothing like it",
        mapped(GQA + REST, "explain", "mapping.yaml", "--tensor", "q0815"),
        "unknown-tensor",
        ran,
    ),
    Row(
        "an option of verify that has no effect",
        done_before(GQA + REST, str, "verify", "out", "--dtype", "bf16"),
        "no-effect",
        without("--dtype", "bf16"),
    ),
    Row(
        "a mapping that was changed",
        done_before(
            GQA + REST,
            lambda call: (
                call.add("# \n".replace("# ", "let: {}"))
                or call.write(call.mapping.replace("output: out", "output: {path: out, dtype: f16}"))
            ),
            "verify",
            "out",
            "--sources",
            "mapping.yaml",
        ),
        "plan-differs",
        without("--sources", "mapping.yaml"),
    ),
    Row(
        "a directory of another tool",
        ("verify", "$gqa"),
        "no-receipt",
        lambda call: setattr(call, "args", ["diff", str(call.world["gqa"]), str(call.world["gqa"])]),
    ),
    Row(
        "a damaged result",
        done_before(GQA + REST, lambda call: flip(call.folder / "out/model.safetensors"), "verify", "out", "-q"),
        "checksum-differs",
        by_hand("convert again with --overwrite --fresh", anew),
    ),
    Row(
        "a result whose config was changed",
        done_before(
            LLAMA.replace("llama", "model") + GQA + REST,
            lambda call: other_config(call.folder / "out"),
            "verify",
            "out",
            "-q",
        ),
        "config-disagrees",
        by_hand("convert again", again),
        words="convert again",
    ),
]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_config(folder: Path) -> None:
    """A config.json of more layers, with a receipt that has its digest: as after an edit by another tool."""
    path = folder / "config.json"
    text = json.dumps(json.loads(path.read_text()) | {"vocab_size": 99})
    path.write_text(text)
    receipt = receipt_of(folder)
    receipt["side_files"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    write_receipt(folder, receipt)


ROWS = [*PRESETS, *ASKED]
