"""What the targets for LLaVA refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from shardmerge import inspect
from tests.adapter_runs import llama, saved, trained
from tests.conftest import read_all
from tests.following import Call, Row, by_hand, ran
from tests.hint_rows.given import (
    CONVERT,
    Given,
    config,
    edited,
    mapped,
    stored,
    told,
)
from tests.hint_rows.targets import FROZEN, LONGER, NEXT, SIZES, TO_HF, TRAINED, V15, WHOLE
from tests.test_mistakes import XTUNER
from tests.test_training_runs import EYE, OFFICIAL, run_of


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


def stretched(call: Call) -> None:
    """Writes the line of the hint into a copy of the language model's config."""
    shutil.copytree(call.world["llm"], call.folder / "llm")
    edited("config.json", **json.loads("{" + call.hint.partition(": ")[2] + "}"))(call.folder / "llm")
    call.change(str(call.world["llm"]), "llm")


def encoder_without_weights(call: Call) -> None:
    (call.folder / "clip").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(call.world["clip"] / name, call.folder / "clip")


def another_encoder(call: Call) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.SiglipVisionModel(config).save_pretrained(call.folder / "siglip")


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
    Row(
        "a LLaVA whose class nobody says",
        official(V15, "llava/official-to-hf", model_type="llava", architectures=None),
        "unsupported-architecture",
        config("ck/config.json", '"architectures": ["LlavaLlamaForCausalLM"]', architectures=["LlavaLlamaForCausalLM"]),
    ),
    Row(
        "a LLaVA-NeXT as a LLaVA 1.5",
        official(NEXT, "llava/official-to-hf"),
        "unsupported-architecture",
        lambda call: call.change("use: llava/official-to-hf", call.ticked()[0]),
    ),
    Row(
        "a LLaVA 1.5 as a LLaVA-NeXT",
        official(V15, "llava/official-to-hf-next"),
        "unsupported-architecture",
        lambda call: call.change("use: llava/official-to-hf-next", call.ticked()[0]),
    ),
    Row(
        "settings that would be lost",
        official(V15, "llava/official-to-hf", embedding_multiplier=12.0),
        "unsupported-architecture",
        config("ck/config.json", "take `embedding_multiplier` out", embedding_multiplier=None),
    ),
    Row(
        "an encoder that is only named",
        mapped(f"sources: {{llava: {V15}/source}}\noutput: out\nuse: llava/official-to-hf\n"),
        "missing-source",
        lambda call: (
            call.change("source}", "source, " + call.hint.partition(": ")[0] + f": {V15}/truth}}")
            or call.add('drop: ["vision:{rest...}"]')
        ),
    ),
    Row(
        "a projector of another depth",
        xtuner(a_layer_more),
        "projector-depth",
        told("`official/llava`", "use: xtuner/llava-to-hf", "use: xtuner/llava-to-official"),
    ),
    Row(
        "a forgotten base",
        "sources: {trained: $alone, llm: $llm}\noutput: out\nuse: xtuner/llava-to-hf\n",
        "missing-source",
        lambda call: call.change("}\noutput", f", {call.hint.partition(':')[0]}: {call.world['clip']}}}\noutput"),
    ),
    Row(
        "an encoder without weights",
        mapped(XTUNER.replace("$clip", "clip"), before=encoder_without_weights),
        "missing-component",
        lambda call: call.change("vision: clip", call.ticked()[0].replace("base_clip", str(call.world["clip"]))),
    ),
    Row(
        "an encoder that was not trained, to XTuner's own",
        XTUNER.replace("to-hf", "to-xtuner")
        + "target: {name: xtuner/llava, trained: trained, text: llm, vision: vision, parts: all}\n",
        "missing-component",
        told("leave `parts: all` out", ", parts: all", ""),
    ),
    Row(
        "another encoder than the training's",
        mapped(XTUNER.replace("$clip", "siglip"), before=another_encoder),
        "contradiction",
        by_hand("name the encoder", lambda call: call.change("siglip", str(call.world["clip"]))),
    ),
    Row("a checkpoint without its projector", xtuner(no_projector), "missing-component", WHOLE),
    Row(
        "a checkpoint without its projector, to LLaVA's own",
        xtuner(no_projector, TRAINED.replace("to-hf", "to-official")),
        "missing-component",
        WHOLE,
    ),
    Row(
        "a checkpoint without its projector, to XTuner's own",
        xtuner(no_projector, TRAINED.replace("to-hf", "to-xtuner")),
        "no-projector",
        ran,
    ),
    Row("a training of longer texts", xtuner(LONGER), "contradiction", by_hand("write into a copy of it", stretched)),
    Row(
        "a LLaVA-NeXT without its newline",
        mapped(
            f"sources: {{llava: ck, vision: {NEXT}/truth}}\noutput: out\nuse: llava/official-to-hf-next\n"
            'drop: ["vision:{rest...}"]\n',
            before=without_newline,
        ),
        "missing-component",
        told("name a checkpoint of a llava_next that has it", "llava: ck", f"llava: {NEXT}/source"),
    ),
    Row(
        "a vocabulary to keep of what is no LLaVA",
        TO_HF.replace("}", ", vocabulary: keep}") + XTUNER,
        "bad-option",
        lambda call: call.change("vocabulary: keep", call.ticked()[0]),
    ),
]


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
    Row(
        "files of two runs of LLaVA",
        two_runs,
        "contradiction",
        by_hand("name sources that belong together", lambda call: call.change("/other/", "/run/")),
    ),
]


ROWS = [*LLAVA, *RUNS]
