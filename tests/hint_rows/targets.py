"""What the targets for LLaVA, InternVL and peft refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.conftest import GOLDEN
from tests.following import Call, Row, by_hand
from tests.hint_rows.given import (
    LAYOUTS,
    Given,
    back,
    config,
    mapped,
    stored,
)
from tests.target_files import save_tokenizer
from tests.test_mistakes import XTUNER

V15, NEXT = LAYOUTS / "llava15_official", LAYOUTS / "llava_next_official"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
FROZEN = GOLDEN / "xtuner/single_frozen/iter_2.pth"
INTERN = LAYOUTS / "internvl_qwen2/source"
TRAINED = XTUNER.replace("$frozen", "ck.pth")
TO_HF = "target: {name: hf/llava, trained: trained, text: llm, vision: vision}\n"


def said_in_training(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    """Changes the training config that a checkpoint carries."""

    def do(state: dict[str, Any]) -> None:
        assert old in state["meta"]["cfg"]
        state["meta"]["cfg"] = state["meta"]["cfg"].replace(old, new, 1)

    return do


WHOLE = by_hand("name the checkpoint of the training", back("."))
LONGER = said_in_training("llm=dict(", "max_position_embeddings=99999,\n    llm=dict(")


def intern(rows: int = 0, option: str = "", added: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Given:
    """An InternVL with a tokenizer beside it."""

    def before(call: Call) -> None:
        shutil.copytree(INTERN, call.folder / "ck")
        save_tokenizer(call.folder / "ck", 60, added=added)

    target = f"target: {{name: hf/internvl, config: internvl{option}}}\n"
    return mapped(f"{target}sources: {{internvl: ck}}\noutput: out\nuse: internvl/original-to-hf\n", before=before)


INTERNVL = [
    Row(
        "a tokenizer without the token of an image",
        intern(),
        "token-id",
        lambda call: call.change("config: internvl}", "config: internvl, image_token_id: 7}"),
    ),
    Row(
        "a token of an image beyond the rows",
        intern(option=", image_token_id: 99999"),
        "token-id",
        by_hand(
            "put the tokenizer of these weights beside them",
            lambda call: (
                save_tokenizer(call.folder / "ck", 60, added=("<unk>", "<s>", "</s>", "<img>", "<IMG_CONTEXT>")),
                call.change(", image_token_id: 99999", ""),
            ),
        ),
    ),
]


def exported(
    state: dict[str, torch.Tensor], *lines: str, own: dict[str, object] | None = None, use: str = "use: peft/export\n"
) -> Given:
    """A training checkpoint with an adapter, as ``ck``, through peft/export."""

    def before(call: Call) -> None:
        stored(call.folder / "ck/model.safetensors", state)
        if own is not None:
            (call.folder / "ck/adapter_config.json").write_text(json.dumps(own))

    return mapped("sources: {trained: ck}\noutput: out\n" + use + "".join(lines), before=before)


def lora(name: str = "", root: str = "", *, b: bool = True) -> dict[str, torch.Tensor]:
    start, middle = f"{root}base_model.model.a.lora_", f".{name}.weight" if name else ".weight"
    return {f"{start}A{middle}": torch.ones(2, 4)} | ({f"{start}B{middle}": torch.ones(4, 2)} if b else {})


OWN: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"]}
ALPHA = "target: {name: peft/adapter, trained: trained, alpha: 4}\n"

PEFT = [
    Row(
        "an adapter whose alpha nobody says",
        exported(lora()),
        "adapter-alpha",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "trained")),
    ),
    Row(
        "half an adapter",
        exported(lora(b=False), ALPHA),
        "adapter-incomplete",
        by_hand("fetch the checkpoint again, whole", lambda call: stored(call.folder / "ck/model.safetensors", lora())),
    ),
    Row(
        "an adapter at two places",
        exported(
            lora(root="x.") | lora(root="y."),
            ALPHA,
            'tensors: {"base_model.{r...}": "trained:x.base_model.{r...}"}\ndrop: ["trained:y.{r...}"]\n',
            use="",
        ),
        "no-adapter",
        lambda call: call.change(
            ALPHA.strip(), call.ticked()[0].replace("SOURCE", "trained").replace("}", ", alpha: 4}")
        ),
    ),
    Row(
        "an adapter of several whose alpha nobody says",
        exported(lora("one") | lora("two"), "target: {name: peft/adapter, trained: trained}\n"),
        "adapter-alpha",
        lambda call: call.change(
            "target: {name: peft/adapter, trained: trained}\n", f"{call.ticked()[0].replace('SOURCE', 'trained')}\n"
        ),
    ),
    Row(
        "an adapter that is not there, to be exported",
        exported(lora("one"), ALPHA.replace("alpha: 4", "alpha: 4, adapter: two")),
        "unknown-adapter",
        lambda call: call.change("adapter: two", call.ticked()[0]),
    ),
    Row(
        "an adapter by name where names say none",
        exported(lora(), ALPHA.replace("alpha: 4", "alpha: 4, adapter: two")),
        "unknown-adapter",
        by_hand("remove `adapter:`", lambda call: call.change(", adapter: two", "")),
    ),
    Row(
        "an adapter of placeholders to be exported",
        exported({name: torch.empty(0) for name in lora()}, ALPHA),
        "empty-adapter",
        by_hand(
            "the DeepSpeed checkpoint beside it", lambda call: stored(call.folder / "ck/model.safetensors", lora())
        ),
    ),
    Row(
        "a rank of another run, to be exported",
        exported(lora(), own=OWN | {"r": 4}),
        "adapter-rank",
        config("ck/adapter_config.json", "put the right adapter_config.json", r=2),
    ),
]

ROWS = [*INTERNVL, *PEFT]
