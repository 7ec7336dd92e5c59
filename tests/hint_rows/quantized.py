"""Quantized weights where numbers are needed, and scales that are lost, odd or left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import torch
from safetensors.torch import load_file

from tests.adapter_runs import llama, saved
from tests.following import Call, Row, by_hand, under
from tests.hint_rows.given import CONVERT, Given, mapped, told
from tests.test_mistakes import REST
from tests.test_quantized import (
    BLOCKS,
    F32,
    FP8,
    I8,
    QUANTIZED,
    STATED,
    Q,
    State,
    config,
    foreign,
    quantized,
    write,
)

UP = "model.layers.0.mlp.up_proj.weight"
SOURCE = "sources: {s: ck}\noutput: out\n"
ALL = 'tensors:\n  "{rest...}": "s:{rest...}"\n'
LIKE = "target: {name: hf/model, text: s}\n"


def float8(change: Callable[[State], object] = str, text: str = "") -> Given:
    """A model of float8 blocks, its tensors changed; as it was, it lies aside; the 16-bit model is ``whole``."""

    def given(call: Call) -> Sequence[str]:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
        whole = saved(llama(**sizes).bfloat16(), call.folder / "whole")
        state = quantized(load_file(whole / "model.safetensors"))
        said = config(whole) | {"quantization_config": STATED}
        write(call.folder / "ck", state, said)
        shutil.copytree(call.folder / "ck", call.folder / "aside")
        change(state)
        write(call.folder / "ck", state, said)
        if text:
            return mapped(text)(call)
        return [*CONVERT, "ck", "out", "--dtype", "bf16"]

    return given


def fetched(call: Call) -> None:
    """Fetches the checkpoint again."""
    shutil.rmtree(call.folder / "ck")
    shutil.copytree(call.folder / "aside", call.folder / "ck")


def cast(state: State) -> None:
    state.update({name: tensor.bfloat16() for name, tensor in state.items() if tensor.dtype == FP8})


def codes_of(name: str, text: str = "", *args: str) -> Given:
    """A checkpoint of another library's codes, and the model that it was quantized from."""

    def given(call: Call) -> Sequence[str]:
        shutil.copytree(foreign(name, call.folder), call.folder / "ck")
        write(call.folder / "whole", {"m.weight": torch.ones(4, 4)}, {})
        return mapped(text)(call) if text else [*CONVERT, "ck", "out", *args]

    return given


def eight_bit(call: Call) -> None:
    state = {"embed_tokens.weight": I8, "embed_tokens.weight_scale": F32}
    write(call.folder / "ck", state, {"vocab_size": 8, "quantization_config": {"quant_method": "gemma"}})


def gate(call: Call) -> None:
    """A module that the config names as not quantized."""
    state = {"model.m.weight": Q, "model.m.weight_scale_inv": BLOCKS, "model.gate.weight": torch.ones(4, 4)}
    said = {"quant_method": "fp8", "modules_to_not_convert": ["model.gate"]}
    write(call.folder / "ck", state, {"quantization_config": said})


def torchao(call: Call) -> None:
    shutil.copytree(QUANTIZED / "torchao-float8", call.folder / "ck")
    write(call.folder / "whole", {"w": torch.ones(4, 4)}, {})


def two_kinds(call: Call) -> None:
    """Codes of a source whose config is not that of the result."""
    shutil.copytree(foreign("GPTQ", call.folder), call.folder / "ck")
    write(call.folder / "b", {"o.weight": torch.ones(4, 4)}, {})


SCALES = [
    Row(
        "numbers beside scales", float8(cast), "scales-beside-numbers", by_hand("fetch the float8 checkpoint", fetched)
    ),
    Row(
        "numbers beside scales that are multiplied by now",
        float8(cast, SOURCE + LIKE + ALL),
        "scales-beside-numbers",
        under("drop"),
    ),
    Row(
        "scales of another model",
        float8(lambda state: state.update({f"{UP}_scale_inv": torch.ones(5, 3)})),
        "odd-scales",
        by_hand("fetch the checkpoint again", fetched),
    ),
    Row(
        "a weight that lost its scale",
        float8(lambda state: state.pop(f"{UP}_scale_inv")),
        "missing-scales",
        by_hand("fetch the checkpoint again", fetched),
    ),
    Row(
        "a rule for scales that are used up",
        float8(str, SOURCE.replace("out\n", "{path: out, dtype: bf16}\n") + ALL + f'  old: "s:{UP}_scale_inv"\n'),
        "rule-matches-nothing",
        told("remove this rule", f'  old: "s:{UP}_scale_inv"\n', ""),
    ),
]

CODES = [
    Row(
        "codes whose header is not carried",
        mapped(SOURCE + ALL, before=torchao),
        "packed-weights",
        by_hand("or name the 16-bit model", lambda call: setattr(call, "args", [*CONVERT, "whole", "out"])),
    ),
    Row(
        "codes without their scales",
        codes_of("GPTQ", SOURCE + ALL + "drop: [s:m.scales]\n"),
        "codes-without-scales",
        told("drop none of them alone", "drop: [s:m.scales]\n", ""),
    ),
    Row(
        "a cast of codes",
        codes_of("GPTQ", "", "--dtype", "bf16"),
        "packed-weights",
        by_hand("leave the dtype out", lambda call: (call.args.remove("--dtype"), call.args.remove("bf16"))),
    ),
    Row(
        "rows of codes",
        mapped(SOURCE + LIKE + "vocabulary: {rows: 16}\n" + ALL, before=eight_bit),
        "packed-weights",
        told("leave `vocabulary:` out", "vocabulary: {rows: 16}\n", ""),
    ),
    Row(
        "modules that the config names by their old names",
        mapped(SOURCE + LIKE + 'tensors:\n  "text.{rest...}": "s:model.{rest...}"\n', before=gate),
        "stale-quantization",
        lambda call: call.change("output: out", "output: {path: out, " + call.ticked()[0].partition("{")[2]),
    ),
    Row(
        "codes under the config of another source",
        mapped(
            "sources: {s: ck, b: b}\noutput: out\n" + LIKE.replace("s}", "b}") + ALL + "  o.weight: b:o.weight\n",
            before=two_kinds,
        ),
        "mixed-quantization",
        told("from the source of the config", "text: b", "text: s"),
    ),
    Row(
        "4-bit weights in an op",
        "sources: {m: $packed}\noutput: out\ntensors:\n" + REST + '  head: {op: transpose, of: "m:lm_head.weight"}\n',
        "packed-weights",
        told("let `m` be the 16-bit model", "$packed", "$base"),
    ),
    Row(
        "weights that are no numbers in a LoRA of its own",
        "sources: {m: $mixed, l: $linear}\noutput: out\ntensors:\n  head: {op: lora, of: m:ids, a: m:ids, b: m:w}\n",
        "op-shape",
        told("name the 16-bit model", "of: m:ids, a: m:ids", "of: m:w, a: m:w"),
        "op-shape unmatched-source",
    ),
]

ROWS = [*SCALES, *CODES]
