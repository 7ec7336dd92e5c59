"""What is said of models that another version of transformers wrote."""

from __future__ import annotations

import shutil

import torch

from tests.following import Call, Row, by_hand, change, under
from tests.hint_rows.given import LAYOUTS, Given, mapped, stored

INTERNVL = LAYOUTS / "internvl_qwen2"

ROPES = {kind: {"rope_theta": 1e4, "rope_type": "default"} for kind in ("full_attention", "sliding_attention")}


def named(generation: str, *names: str, **config: object) -> Given:
    """A model with these tensors as ``ck``, to a generation."""

    def before(call: Call) -> None:
        stored(call.folder / "ck/model.safetensors", {name: torch.ones(2) for name in names}, **config)

    target = f'target: {{name: hf/names, model: hf, generation: "{generation}"}}\n'
    return mapped(f"sources: {{hf: ck}}\noutput: out\nuse: hf/to-4.51\n{target}", before=before)


def asked(generation: str) -> Row:
    return Row(
        f"the generation {generation}, which is none",
        named(generation, "lm_head.weight", model_type="gpt2"),
        "unknown-generation",
        lambda call: call.change(f'generation: "{generation}"', call.ticked()[0]),
    )


def back_to_original(original: str) -> Given:
    """An InternVL of transformers, and something that is called its original."""

    def before(call: Call) -> None:
        shutil.copytree(LAYOUTS / original, call.folder / "original")

    text = f"sources: {{hf: {INTERNVL / 'truth'}, original: original}}\noutput: out\nuse: internvl/hf-to-original\n"
    return mapped(text, before=before)


def downloaded(call: Call) -> None:
    shutil.rmtree(call.folder / "original")
    shutil.copytree(INTERNVL / "source", call.folder / "original")


ROWS = [
    Row(
        "an original InternVL that is none",
        back_to_original("internvl_qwen2/truth"),
        "unsupported-architecture",
        by_hand("download the InternVLChatModel directory that the model was made of", downloaded),
    ),
    Row(
        "the original of another InternVL",
        back_to_original("internvl_internlm2/source"),
        "contradiction",
        by_hand("name the InternVLChatModel directory that the model was made of", downloaded),
    ),
    asked("5.23"),
    asked("newest"),
    Row(
        "a tensor that is not of the model",
        named("5.6", "model.norm.weight", "value_head.weight", model_type="qwen2_vl"),
        "unknown-names",
        under("drop"),
    ),
    Row(
        "a model whose renames are not known",
        named("5.6", "embeddings.cls_token", model_type="timesfm2_5"),
        "unknown-renames",
        change(
            'use: hf/to-4.51\ntarget: {name: hf/names, model: hf, generation: "5.6"}',
            'target: {name: hf/model, text: hf}\ntensors: {"{rest...}": "hf:{rest...}"}',
            "target: {name: hf/model, text: SOURCE}",
        ),
    ),
    Row(
        "rotary embeddings that only 5.x can say",
        named("4.51", "norm.weight", model_type="modernbert", rope_parameters=ROPES),
        "unsupported-rope",
        lambda call: call.change('generation: "4.51"', call.ticked()[0]),
    ),
]
