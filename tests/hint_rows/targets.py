"""What the targets for LLaVA, InternVL and peft refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import transformers

from shardmerge import inspect
from tests.adapter_runs import llama, saved, trained
from tests.conftest import GOLDEN, read_all
from tests.following import RUN, Call, Follow, Row, by_hand, ran, said
from tests.hint_rows.given import (
    CONVERT,
    LAYOUTS,
    Given,
    back,
    changed,
    config,
    edited,
    made,
    mapped,
    rewritten,
    stored,
    told,
)
from tests.target_files import save_tokenizer
from tests.test_mistakes import XTUNER
from tests.test_training_runs import EYE, OFFICIAL, run_of

V15, NEXT = LAYOUTS / "llava15_official", LAYOUTS / "llava_next_official"
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0}  # fmt: skip
FROZEN = GOLDEN / "xtuner/single_frozen/iter_2.pth"
INTERN = LAYOUTS / "internvl_qwen2/source"
TRAINED = XTUNER.replace("$frozen", "ck.pth")
TO_HF = "target: {name: hf/llava, trained: trained, text: llm, vision: vision}\n"


def official(case: Path, preset: str, **values: object) -> Given:
    """A LLaVA of LLaVA's own code, its config changed, through a preset."""

    def before(call: Call) -> None:
        shutil.copytree(case / "source", call.folder / "ck")
        edited("config.json", **values)(call.folder / "ck")

    text = f'sources: {{llava: ck, vision: {case}/truth}}\noutput: out\nuse: {preset}\ndrop: ["vision:{{rest...}}"]\n'
    return mapped(text, before=before)


def xtuner(change: Callable[[dict[str, Any]], object], text: str = TRAINED) -> Given:
    """A training checkpoint of XTuner, changed; as it was, it lies aside."""

    def before(call: Call) -> None:
        tensors = {name: torch.from_numpy(array.astype("float32")) for name, array in read_all(inspect(FROZEN)).items()}
        state = {"state_dict": tensors, "meta": {"cfg": (FROZEN.parent / "config.py").read_text()}}
        (call.folder / "aside").mkdir()
        torch.save(state, call.folder / "aside/ck.pth")
        change(state)
        torch.save(state, call.folder / "ck.pth")

    return mapped(text, before=before)


def no_projector(state: dict[str, Any]) -> None:
    held = state["state_dict"]
    for name in [name for name in held if "projector" in name]:
        held.pop(name)
    held["llm.model.norm.weight"] = torch.ones(12)


def a_layer_more(state: dict[str, Any]) -> None:
    """A projector of three layers."""
    held = state["state_dict"]
    for leaf in ("weight", "bias"):
        held[f"projector.model.4.{leaf}"] = held[f"projector.model.2.{leaf}"].clone()


def said_in_training(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    """Changes the training config that a checkpoint carries."""

    def do(state: dict[str, Any]) -> None:
        assert old in state["meta"]["cfg"]
        state["meta"]["cfg"] = state["meta"]["cfg"].replace(old, new, 1)

    return do


WHOLE = by_hand("name the checkpoint of the training", back("."))
LONGER = said_in_training("llm=dict(", "max_position_embeddings=99999,\n    llm=dict(")


def stretched(call: Call) -> None:
    """Writes the line of the hint into a copy of the language model's config."""
    shutil.copytree(call.world["llm"], call.folder / "llm")
    edited("config.json", **json.loads("{" + call.hint.partition(": ")[2] + "}"))(call.folder / "llm")
    call.change(str(call.world["llm"]), "llm")


def encoder_without_weights(call: Call) -> None:
    (call.folder / "clip").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(call.world["clip"] / name, call.folder / "clip")


def split_first(call: Call) -> None:
    """Converts the language model as the hint says."""
    args = call.args
    call.args = [*CONVERT, str(LAYOUTS / "phi3_to_llama_gqa/source"), "split", *call.hint.rpartition(": ")[2].split()]
    assert call.attempt() == ()
    call.args = args
    call.change(str(LAYOUTS / "phi3_to_llama_gqa/source"), "split")


def without_newline(call: Call) -> None:
    shutil.copytree(NEXT / "source", call.folder / "ck")
    held = {
        name: one
        for path in sorted((call.folder / "ck").glob("*.safetensors"))
        for name, one in load_file(path).items()
    }
    for path in (call.folder / "ck").glob("model*"):
        path.unlink()
    held.pop("model.image_newline")
    stored(call.folder / "ck/model.safetensors", held)


LLAVA = [
    Row("a LLaVA whose class nobody says", official(V15, "llava/official-to-hf", model_type="llava", architectures=None),
        "unsupported-architecture", config("ck/config.json", '"architectures": ["LlavaLlamaForCausalLM"]',
                                            architectures=["LlavaLlamaForCausalLM"])),
    Row("a LLaVA-NeXT as a LLaVA 1.5", official(NEXT, "llava/official-to-hf"), "unsupported-architecture",
        lambda call: call.change("use: llava/official-to-hf", call.ticked()[0])),
    Row("a LLaVA 1.5 as a LLaVA-NeXT", official(V15, "llava/official-to-hf-next"), "unsupported-architecture",
        lambda call: call.change("use: llava/official-to-hf-next", call.ticked()[0])),
    Row("settings that would be lost", official(V15, "llava/official-to-hf", embedding_multiplier=12.0),
        "unsupported-architecture", config("ck/config.json", "take `embedding_multiplier` out", embedding_multiplier=None)),
    Row("an encoder that is only named", mapped(
        f"sources: {{llava: {V15}/source}}\noutput: out\nuse: llava/official-to-hf\n"), "missing-source",
        lambda call: call.change("source}", "source, " + call.hint.partition(": ")[0] + f": {V15}/truth}}")
        or call.add('drop: ["vision:{rest...}"]')),
    Row("a projector of another depth", xtuner(a_layer_more), "projector-depth",
        told("`official/llava`", "use: xtuner/llava-to-hf", "use: xtuner/llava-to-official")),
    Row("a forgotten base", "sources: {trained: $alone, llm: $llm}\noutput: out\nuse: xtuner/llava-to-hf\n", "missing-source",
        lambda call: call.change("}\noutput", f", {call.hint.partition(':')[0]}: {call.world['clip']}}}\noutput")),
    Row("an encoder without weights", mapped(XTUNER.replace("$clip", "clip"), before=encoder_without_weights),
        "missing-component", lambda call: call.change("vision: clip", call.ticked()[0].replace("base_clip",
        str(call.world["clip"])))),
    Row("an encoder that was not trained, to XTuner's own", XTUNER.replace("to-hf", "to-xtuner")
        + "target: {name: xtuner/llava, trained: trained, text: llm, vision: vision, parts: all}\n", "missing-component",
        told("leave `parts: all` out", ", parts: all", "")),
    Row("a language model of fused layers", XTUNER.replace("$llm", str(LAYOUTS / "phi3_to_llama_gqa/source")),
        "unsupported-architecture", by_hand("--use llama/phi3-to-llama", split_first), "shape-mismatch"),
    Row("a checkpoint without its projector", xtuner(no_projector), "missing-component", WHOLE),
    Row("a checkpoint without its projector, to LLaVA's own", xtuner(no_projector, TRAINED.replace("to-hf", "to-official")),
        "missing-component", WHOLE),
    Row("a checkpoint without its projector, to XTuner's own", xtuner(no_projector, TRAINED.replace("to-hf", "to-xtuner")),
        "no-projector", ran),
    Row("a training of longer texts", xtuner(LONGER), "contradiction", by_hand("write into a copy of it", stretched)),
    Row("a LLaVA-NeXT without its newline", mapped(
        f"sources: {{llava: ck, vision: {NEXT}/truth}}\noutput: out\nuse: llava/official-to-hf-next\n"
        'drop: ["vision:{rest...}"]\n', before=without_newline), "missing-component",
        told("name a checkpoint that has it", "llava: ck", f"llava: {NEXT}/source")),
    Row("a vocabulary to keep of what is no LLaVA", TO_HF.replace("}", ", vocabulary: keep}") + XTUNER, "bad-option",
        lambda call: call.change("vocabulary: keep", call.ticked()[0])),
]  # fmt: skip


def intern(rows: int = 0, option: str = "", added: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Given:
    """An InternVL with a tokenizer beside it."""

    def before(call: Call) -> None:
        shutil.copytree(INTERN, call.folder / "ck")
        save_tokenizer(call.folder / "ck", 60, added=added)

    target = f"target: {{name: hf/internvl, config: internvl{option}}}\n"
    return mapped(f"{target}sources: {{internvl: ck}}\noutput: out\nuse: internvl/original-to-hf\n", before=before)


INTERNVL = [
    Row("a tokenizer without the token of an image", intern(), "token-id",
        lambda call: call.change("config: internvl}", "config: internvl, image_token_id: 7}")),
    Row("a token of an image beyond the rows", intern(option=", image_token_id: 99999"), "token-id",
        by_hand("put the tokenizer of these weights beside them", lambda call: (
            save_tokenizer(call.folder / "ck", 60, added=("<unk>", "<s>", "</s>", "<img>", "<IMG_CONTEXT>")),
            call.change(", image_token_id: 99999", "")))),
]  # fmt: skip


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
    Row("an adapter whose alpha nobody says", exported(lora()), "adapter-alpha",
        lambda call: call.add(call.ticked()[0].replace("SOURCE", "trained"))),
    Row("half an adapter", exported(lora(b=False), ALPHA), "adapter-incomplete",
        by_hand("fetch the checkpoint again, whole", lambda call: stored(call.folder / "ck/model.safetensors", lora()))),
    Row("an adapter at two places", exported(lora(root="x.") | lora(root="y."), ALPHA, 'tensors: {"base_model.{r...}": '
        '"trained:x.base_model.{r...}"}\ndrop: ["trained:y.{r...}"]\n', use=""), "no-adapter",
        lambda call: call.change(ALPHA.strip(), call.ticked()[0].replace("SOURCE", "trained").replace("}", ", alpha: 4}"))),
    Row("two adapters to be exported", exported(lora("one") | lora("two"), ALPHA, 'tensors: {"{m...}.weight": '
        '"trained:{m...}.one.weight"}\ndrop: ["trained:{m...}.two.weight"]\n', use=""), "several-adapters",
        by_hand("selected_adapters", lambda call: (stored(call.folder / "ck/model.safetensors", lora("one")),
        call.change('drop: ["trained:{m...}.two.weight"]\n', "")))),
    Row("an adapter of placeholders to be exported",
        exported({name: torch.empty(0) for name in lora()}, ALPHA), "empty-adapter",
        by_hand("the DeepSpeed checkpoint beside it", lambda call: stored(call.folder / "ck/model.safetensors", lora()))),
    Row("a rank of another run, to be exported", exported(lora(), own=OWN | {"r": 4}), "adapter-rank",
        config("ck/adapter_config.json", "put the right adapter_config.json", r=2)),
]  # fmt: skip


def two_runs(call: Call) -> Sequence[str]:
    """The projector of one run, the adapter of another."""
    saved(llama(**SIZES), call.folder / "llm")
    eye = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**EYE))
    eye.save_pretrained(call.folder / "clip")
    trained(llama(**SIZES), call.folder / "adapter", target_modules=["q_proj"])
    bases = run_of(call.folder, call.folder / "run", OFFICIAL | {"mm_vision_select_layer": -1})
    other = run_of(call.folder, call.folder / "other", OFFICIAL, adapter=False)
    named = bases | {"projector": other["projector"]}
    more = [word for name, path in named.items() for word in ("--base", f"{name}={path}")]
    return [*CONVERT, "llm", "out", "--use", "llava/official-to-hf", *more]


RUNS = [
    Row("files of two runs of LLaVA", two_runs, "contradiction",
        by_hand("name sources that belong together", lambda call: call.change("/other/", "/run/"))),
]  # fmt: skip

ROWS = [*LLAVA, *INTERNVL, *PEFT, *RUNS]
