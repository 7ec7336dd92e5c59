"""Adapters that cannot be merged as they are; made by peft, and mended with peft and transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
)

from tests.adapter_runs import (
    WEIGHTS,
    change_config,
    change_tensors,
    llama,
    opened,
    saved,
    shaken,
    trained,
    write_mapping,
)
from tests.following import RUN, Call, Follow, Row, by_hand, ran, said
from tests.hint_rows.given import CONVERT, Given, told
from tests.test_mistakes import ALL_LLM, LORA, MERGED

FIRST = "base_model.model.model.layers.0.self_attn.q_proj."
MERGE_LORA = ("from: lora, onto: base",)


def run_of(
    make: Callable[[], nn.Module] = llama,
    then: Callable[[Path], object] = str,
    lines: Sequence[str] = MERGE_LORA,
    **settings: object,
) -> Given:
    """A base and a LoRA run on it as ``base`` and ``lora``, the run as it was aside, and a mapping that merges."""

    def given(call: Call) -> Sequence[str]:
        base = make()
        saved(base, call.folder / "base")
        trained(opened(base, call.folder / "base"), call.folder / "lora", **settings)
        shutil.copytree(call.folder / "lora", call.folder / "aside")
        write_mapping(call.folder, list(lines), "base", ["lora"])
        then(call.folder)
        return RUN

    return given


def lora(**values: object) -> Callable[[Path], object]:
    """Changes the config of the run."""
    return lambda folder: change_config(folder / "lora", **values)


def without(words: str) -> Callable[[Path], object]:
    """Takes tensors out of the adapter."""

    def do(folder: Path) -> None:
        names = load_file(folder / "lora" / WEIGHTS)
        change_tensors(folder / "lora", dict.fromkeys(name for name in names if words in name))

    return do


def of_the_run(call: Call) -> None:
    """Puts the adapter of the run there, as it was saved."""
    shutil.rmtree(call.folder / "lora")
    shutil.copytree(call.folder / "aside", call.folder / "lora")


def setting(words: str, line: str) -> Follow:
    """Says something more under ``adapters:``."""
    return told(words, "onto: base", f"onto: base, {line}")


def by_peft(call: Call) -> None:
    """Runs the line of Python that the hint has, and converts what it saved."""
    line = call.hint.partition("convert MERGED: ")[2].partition("; if it")[0]
    for word, name in (("BASE", "base"), ("ADAPTER", "lora"), ("MERGED", "merged")):
        line = line.replace(f"({word}", f'("{name}"').replace(f" {word})", f' "{name}")')
    exec(line, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})  # ours
    call.args = [*CONVERT, "merged", "out"]


def another_kind(folder: Path) -> None:
    """An adapter of MiSS in the place of the LoRA."""
    shutil.rmtree(folder / "lora")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "base"), MissConfig(r=4, target_modules=["q_proj"])
    )
    shaken(model)
    model.save_pretrained(folder / "lora")


def several(said: str, adapters: Sequence[str] = ("policy", "reference")) -> Given:
    """A state dict with adapters by these names."""

    def given(call: Call) -> Sequence[str]:
        base = llama()
        saved(base, call.folder / "base")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
        model = get_peft_model(base, config, adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, config)
        torch.save(model.state_dict(), call.folder / "run.pth")
        write_mapping(call.folder, [f"from: run.pth, onto: base, alpha: 8{said}"], "base", ["run.pth"])
        return RUN

    return given


def two_runs(*lines: str, **second: object) -> Given:
    """Two LoRA runs on a base as ``one`` and ``two``, and a mapping that merges them."""

    def given(call: Call) -> Sequence[str]:
        base = llama()
        saved(base, call.folder / "base")
        trained(opened(base, call.folder / "base"), call.folder / "one")
        trained(opened(base, call.folder / "base"), call.folder / "two", seed=2, **second)
        write_mapping(call.folder, list(lines), "base", ["one", "two"])
        return RUN

    return given


def square(folder: Path) -> None:
    """A GPT-2 without config.json and without a layer that tells which way round its layers are."""
    state = load_file(folder / "base/model.safetensors")
    square = {name: one for name, one in state.items() if "c_attn" not in name and "c_fc" not in name}
    save_file(square, folder / "base/model.safetensors")
    (folder / "base/config.json").unlink()
    change_config(folder / "lora", fan_in_fan_out=False)
    path = folder / "mapping.yaml"
    path.write_text(path.read_text().replace("target: {name: hf/model, text: base}\n", ""))


def renamed(prefix: str, where: str) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        path = folder / where
        state = {f"{prefix}{name}": one for name, one in load_file(path).items()}
        save_file(state, path, {"format": "pt"})

    return do


def prefixed_run(folder: Path) -> None:
    """The adapter with a prefix of somebody's own, in a file of its own."""
    renamed("mine.", f"lora/{WEIGHTS}")(folder)
    (folder / "lora" / WEIGHTS).rename(folder / "run.safetensors")
    write_mapping(folder, ["from: run.safetensors, onto: base, alpha: 8"], "base", ["run.safetensors"])


CONFIG = [
    Row(
        "another kind of adapter",
        run_of(then=another_kind),
        "not-lora",
        by_hand("merge_and_unload().save_pretrained(MERGED)", by_peft),
    ),
    Row(
        "a setting that only peft can merge",
        run_of(kasa_config=KasaConfig(beta=1e-4)),
        "adapter-setting",
        by_hand("merge_and_unload().save_pretrained(MERGED)", by_peft),
    ),
    Row(
        "a setting that nobody knows",
        run_of(then=lora(something_of_tomorrow=7)),
        "adapter-setting",
        by_hand("remove the line from adapter_config.json", of_the_run),
    ),
    Row(
        "an initialisation that changed the base",
        run_of(then=lora(init_lora_weights="corda")),
        "adapter-setting",
        by_hand(
            "set init_lora_weights to true", lambda call: change_config(call.folder / "lora", init_lora_weights=True)
        ),
    ),
    Row(
        "an alpha of a list",
        run_of(then=lora(lora_alpha=[8])),
        "odd-setting",
        by_hand("the value that the run had", of_the_run),
    ),
    Row(
        "an alpha without end",
        run_of(lines=["from: lora, onto: base, alpha: 1e999"]),
        "odd-setting",
        lambda call: call.change("alpha: 1e999", call.ticked()[0].replace("NUMBER", "8")),
    ),
    Row(
        "a config of another rank",
        run_of(then=lora(r=8)),
        "adapter-rank",
        lambda call: call.change("onto: base", f"onto: base, {call.ticked()[0]}"),
    ),
    Row(
        "a pattern that looks around",
        run_of(then=lora(rank_pattern={"(?=layers).*q_proj": 4})),
        "odd-pattern",
        by_hand("a line for each module", lambda call: change_config(call.folder / "lora", rank_pattern={"q_proj": 4})),
    ),
    Row(
        "magnitudes of a run that was no DoRA",
        run_of(use_dora=True, then=lora(use_dora=False)),
        "adapter-setting",
        by_hand("set use_dora to true", lambda call: change_config(call.folder / "lora", use_dora=True)),
    ),
    Row(
        "tokens of another run",
        run_of(trainable_token_indices=[3, 4], then=lora(trainable_token_indices=[3])),
        "adapter-setting",
        by_hand("the adapter_config.json of the run", of_the_run),
    ),
    Row(
        "alpha is nowhere",
        LORA.replace("$lora", "$no_alpha") + MERGED + ALL_LLM,
        "unknown-alpha",
        lambda call: call.change(MERGED.strip(), call.ticked()[0].replace("NUMBER", "8")),
    ),
]

PARTS = [
    Row(
        "a module without its weights",
        run_of(modules_to_save=["lm_head"], then=without("lm_head")),
        "adapter-incomplete",
        by_hand("fetch or save the adapter again, whole", of_the_run),
    ),
    Row(
        "names of another library",
        run_of(then=lambda folder: change_tensors(folder / "lora", {f"{FIRST}lora_down.weight": torch.zeros(4, 16)})),
        "unknown-adapter-tensor",
        by_hand("save it with peft's save_pretrained", of_the_run),
    ),
    Row(
        "placeholders of an adapter",
        run_of(then=lambda folder: change_tensors(folder / "lora", {f"{FIRST}lora_A.weight": torch.empty(0)})),
        "empty-adapter",
        by_hand("or save again with stage3_gather", of_the_run),
    ),
    Row(
        "two adapters in one file",
        several(""),
        "several-adapters",
        lambda call: call.change("alpha: 8", f"alpha: 8, {call.ticked()[1]}"),
    ),
    Row("an adapter of a misspelt name", several(", name: polcy"), "unknown-adapter", said("polcy")),
    Row(
        "an adapter of quite another name",
        several(", name: zzz"),
        "unknown-adapter",
        told("known here: policy", "name: zzz", "name: policy"),
    ),
    Row(
        "an adapter of many that has another name",
        several(", name: zzz", [f"adapter{number}" for number in range(21)]),
        "unknown-adapter",
        lambda call: call.change("name: zzz", call.ticked()[0]),
    ),
    Row(
        "a name where there are none",
        run_of(lines=["from: lora, onto: base, name: default"]),
        "unknown-adapter",
        told("remove `name:`", ", name: default", ""),
    ),
    Row(
        "an adapter with a wrapper's prefix",
        run_of(then=prefixed_run),
        "not-an-adapter",
        lambda call: call.change("from: run_safetensors", call.ticked()[0]),
    ),
    Row(
        "from and onto swapped",
        LORA + "adapters: [{from: llm, onto: lora}]\n" + ALL_LLM,
        "not-an-adapter",
        ran,
    ),
]
TOGETHER = [
    Row(
        "adapters combined in two ways",
        two_runs("from: one, onto: base", "from: one, onto: one, combination_type: linear", "from: two, onto: one"),
        "adapter-setting",
        told("the same `combination_type:`", "from: two, onto: one", "from: two, onto: one, combination_type: linear"),
        words="the same",
    ),
    Row(
        "a DoRA onto an adapter",
        two_runs("from: one, onto: base", "from: two, onto: one", use_dora=True),
        "adapter-setting",
        told("name the model as `onto`, with `combination_type: cat`", "onto: one", "onto: base"),
        words="name the model",
    ),
]

ROWS = [*CONFIG, *PARTS, *TOGETHER]
