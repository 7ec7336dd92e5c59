"""Adapters that cannot be merged as they are; made by peft, and mended with peft and transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.adapter_runs import (
    WEIGHTS,
    change_config,
    change_tensors,
    gpt2,
    llama,
    opened,
    saved,
    shaken,
    trained,
    write_mapping,
)
from tests.following import RUN, Call, Follow, Row, by_hand, ran, said
from tests.hint_rows.given import CONVERT, LAYOUTS, Given, stored, told
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
    exec(line, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})  # noqa: S102  # ours
    call.args = [*CONVERT, "merged", "out"]


def another_kind(folder: Path) -> None:
    """An adapter of LoHa in the place of the LoRA."""
    shutil.rmtree(folder / "lora")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), LoHaConfig(target_modules=["q_proj"]))
    shaken(model)
    model.save_pretrained(folder / "lora")


def two_runs(call: Call) -> Sequence[str]:
    """Two adapters that replace the head."""
    base = llama()
    saved(base, call.folder / "base")
    for place in (0, 1):
        trained(opened(base, call.folder / "base"), call.folder / f"l{place}", place, modules_to_save=["lm_head"])
    write_mapping(call.folder, ["from: l0, onto: base", "from: l1, onto: base"], "base", ["l0", "l1"])
    return RUN


def one_after_the_other(call: Call) -> None:
    write_mapping(call.folder, ["from: l0, onto: base"], "base", ["l0"])
    assert call.attempt() == ()
    (call.folder / "out").rename(call.folder / "first")
    write_mapping(call.folder, ["from: l1, onto: first"], "first", ["l1"])


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


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))


def untied(call: Call) -> None:
    """With transformers: a head of its own."""
    model = BertForMaskedLM.from_pretrained(call.folder / "base")
    model.config.tie_word_embeddings = False
    decoder = model.cls.predictions.decoder
    decoder.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(call.folder / "base")


def grown(call: Call) -> Sequence[str]:
    """A run on 28 rows of a base of 24, which saved the embedding alone."""
    base = llama()
    saved(base, call.folder / "base")
    larger = opened(base, call.folder / "base")
    larger.resize_token_embeddings(28, mean_resizing=False)
    trained(larger, call.folder / "lora", modules_to_save=["embed_tokens"])
    without("lm_head")(call.folder)
    write_mapping(call.folder, list(MERGE_LORA), "base", ["lora"])
    return RUN


def resized(call: Call) -> None:
    model = LlamaForCausalLM.from_pretrained(call.folder / "base")
    model.resize_token_embeddings(28, mean_resizing=False)
    model.save_pretrained(call.folder / "base")


def new_head(call: Call) -> Sequence[str]:
    """A classifier whose score is in modules_to_save, and a base without one."""
    saved(llama(pad_token_id=0), call.folder / "base")
    model = LlamaForSequenceClassification.from_pretrained(call.folder / "base", num_labels=3)
    trained(model, call.folder / "lora", target_modules=["q_proj"], modules_to_save=["score"])
    write_mapping(call.folder, list(MERGE_LORA), "base", ["lora"])
    return RUN


def with_that_head(call: Call) -> None:
    """Runs the line of Python that the hint has."""
    line = call.hint.rpartition("makes it: ")[2]
    line = line.replace("BASE, num_labels=N", '"base", num_labels=3').replace("NEW_BASE", '"new"')
    exec(line, {"AutoModelForSequenceClassification": AutoModelForSequenceClassification})  # noqa: S102  # ours
    call.change("base: base", "base: new")


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
    """The adapter with a wrapper's prefix, in a file of its own."""
    renamed("module.", f"lora/{WEIGHTS}")(folder)
    (folder / "lora" / WEIGHTS).rename(folder / "run.safetensors")
    write_mapping(folder, ["from: run.safetensors, onto: base, alpha: 8"], "base", ["run.safetensors"])


def training_as_base(folder: Path) -> None:
    """The state dict of a run in the place of the base."""
    (folder / "base").rename(folder / "began_with")
    (folder / "base").mkdir()
    model = trained(LlamaForCausalLM.from_pretrained(folder / "began_with"))
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, folder / "base/model.safetensors")
    shutil.copy(folder / "began_with/config.json", folder / "base")


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
        run_of(then=lora(init_lora_weights="pissa")),
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
        "a pattern that is an expression",
        run_of(then=lora(rank_pattern={"layers\\..*q_proj": 4})),
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

BASES = [
    Row(
        "two adapters that replace one weight",
        two_runs,
        "adapters-clash",
        by_hand("the result as the base of the other", one_after_the_other),
    ),
    Row(
        "a tied head of another name",
        run_of(bert, target_modules=["word_embeddings", "query"]),
        "tied-embeddings",
        by_hand("set config.tie_word_embeddings to false", untied),
    ),
    Row(
        "a head of another shape than the base's",
        run_of(
            modules_to_save=["lm_head"],
            then=lambda folder: change_tensors(
                folder / "lora", {"base_model.model.lm_head.weight": torch.zeros(24, 8)}
            ),
        ),
        "adapter-shape",
        by_hand("the model that the adapter was trained on", of_the_run),
    ),
    Row("a vocabulary that grew on one side", grown, "adapter-vocabulary", by_hand("resize_token_embeddings", resized)),
    Row("a module that the base lacks", new_head, "adapter-new-module", by_hand("makes it", with_that_head)),
    Row(
        "a square layer of an unknown kind",
        run_of(gpt2, target_modules=["attn.c_proj"], then=square),
        "unknown-layer",
        lambda call: call.change("onto: base", f"onto: base, {call.ticked()[0]}"),
    ),
    Row(
        "an adapter onto another model",
        LORA.replace("$base", "$clip") + MERGED + ALL_LLM,
        "adapter-without-base",
        told("name as `llm` the model", "$clip", "$base"),
    ),
    Row(
        "an adapter onto a model of another size",
        LORA.replace("$base", "$llm") + MERGED + ALL_LLM,
        "op-shape",
        told("name the base", "$llm", "$base"),
    ),
    Row(
        "a base with a prefix",
        run_of(then=renamed("language_model.", "base/model.safetensors")),
        "adapter-without-base",
        lambda call: call.change("onto: base", call.ticked()[1]),
        "incomplete-model",
    ),
    Row(
        "a training checkpoint as the base",
        run_of(then=training_as_base),
        "adapter-without-base",
        told("the model that the run began with", "base: base", "base: began_with"),
    ),
    Row(
        "an adapter onto 4-bit weights",
        LORA.replace("$base", "$packed") + MERGED + ALL_LLM,
        "packed-weights",
        told("the 16-bit model that it was quantized from", "$packed", "$base"),
    ),
    Row(
        "a base whose tensors are dropped",
        run_of(then=lambda folder: dropped(folder)),
        "adapter-without-base",
        told("take that line out of `drop`", 'drop: ["base:model.layers.0.self_attn.q_proj.weight"]\n', ""),
    ),
]


def newer_names(call: Call) -> Sequence[str]:
    """A LLaVA by its old names, and an adapter with the new ones."""
    shutil.copytree(LAYOUTS / "llava_names_l4/source", call.folder / "base")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
    stored(call.folder / "lora" / WEIGHTS, {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name.split(".lora_")[0][17:]]}
    (call.folder / "lora/adapter_config.json").write_text(json.dumps(config))
    write_mapping(call.folder, list(MERGE_LORA), "base", ["lora"])
    return RUN


def renamed_base(call: Call) -> None:
    """Converts the base as the hint says, and names that one."""
    merge, call.args = call.args, [*CONVERT, "base", "new", *call.ticked()[0].split()]
    assert call.attempt() == ()
    call.args = merge
    call.change("base: base", "base: new")


BASES.append(
    Row(
        "an adapter with the names of a newer transformers",
        newer_names,
        "adapter-without-base",
        by_hand("convert base first", renamed_base),
    )
)


def dropped(folder: Path) -> None:
    path = folder / "mapping.yaml"
    path.write_text(path.read_text() + 'drop: ["base:model.layers.0.self_attn.q_proj.weight"]\n')


MAPPING = [
    Row(
        "an adapter that nothing uses",
        LORA + ALL_LLM,
        "unmerged-adapter",
        lambda call: call.add(call.ticked()[0].replace("BASE", "llm")),
    ),
    Row(
        "an adapter merged twice",
        LORA + "adapters: [{from: lora, onto: llm}, {from: lora, onto: llm}]\n" + ALL_LLM,
        "adapter-twice",
        told("remove one of the two", ", {from: lora, onto: llm}", ""),
    ),
    Row(
        "an adapter without a base",
        LORA + "adapters: [{from: lora}]\n" + ALL_LLM,
        "missing-parameter",
        lambda call: call.change("{from: lora}", call.ticked()[0].replace("ADAPTER", "lora").replace("BASE", "llm")),
    ),
    Row(
        "an adapter of other captures",
        LORA + 'adapters: [{from: "lora:{a}.{b...}", onto: llm}]\n' + ALL_LLM,
        "bad-capture",
        lambda call: call.change('"lora:{a}.{b...}"', call.ticked()[0]),
    ),
    Row(
        "an adapter converted alone",
        ("convert", "$lora", "out", "--no-sync", "-q"),
        "adapter-alone",
        lambda call: call.args.extend(["--base", f"base={call.world['base']}"]),
    ),
    Row(
        "a directory with the adapter's config alone",
        LORA.replace("$lora", "$no_weights") + MERGED + ALL_LLM,
        "missing-adapter",
        told("copy or download the rest", "$no_weights", "$lora"),
    ),
]

ROWS = [*CONFIG, *PARTS, *BASES, *MAPPING]
