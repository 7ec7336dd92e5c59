"""Adapters and the models that they are merged into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.adapter_runs import (
    WEIGHTS,
    change_tensors,
    gpt2,
    llama,
    opened,
    saved,
    trained,
    write_mapping,
)
from tests.following import RUN, Call, Follow, Given, Row, by_hand
from tests.hint_rows.adapters import MERGE_LORA, of_the_run, run_of, square, without
from tests.hint_rows.given import told
from tests.test_mistakes import ALL_LLM, LORA, MERGED


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
    exec(line, {"AutoModelForSequenceClassification": AutoModelForSequenceClassification})  # ours
    call.change("base: base", "base: new")


def training_as_base(folder: Path) -> None:
    """The state dict of a run in the place of the base."""
    (folder / "base").rename(folder / "began_with")
    (folder / "base").mkdir()
    model = trained(LlamaForCausalLM.from_pretrained(folder / "began_with"))
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, folder / "base/model.safetensors")
    shutil.copy(folder / "began_with/config.json", folder / "base")


def tokens_alone(call: Call) -> Sequence[str]:
    """The state of a run that trained tokens, without its config."""
    model = trained(llama(), call.folder / "aside", trainable_token_indices=[1, 2])
    (call.folder / "run").mkdir()
    state = {name: one.contiguous() for name, one in model.state_dict().items()}
    save_file(state, call.folder / "run/model.safetensors")
    shutil.copy(call.folder / "aside/adapter_config.json", call.folder)
    return ("convert", "run", "out", "--use", "peft/export", "--no-sync", "-q")


def dropped(folder: Path) -> None:
    path = folder / "mapping.yaml"
    path.write_text(path.read_text() + 'drop: ["base:model.layers.0.self_attn.q_proj.weight"]\n')


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
        "a training checkpoint as the base",
        run_of(then=training_as_base),
        "base-with-adapter",
        told("the model that the run began with", "base: base", "base: began_with"),
    ),
    Row(
        "an adapter onto a run with one of its own",
        run_of(then=training_as_base),
        "base-with-adapter",
        lambda call: call.change("adapters: [", f"adapters: [{call.ticked()[0].replace('}', ', alpha: 8}')}, "),
    ),
    Row(
        "trained tokens without their numbers",
        tokens_alone,
        "adapter-tokens",
        by_hand(
            "beside the checkpoint", lambda call: shutil.copy(call.folder / "adapter_config.json", call.folder / "run")
        ),
    ),
    Row(
        "an adapter onto 4-bit weights",
        LORA.replace("$base", "$packed") + MERGED + ALL_LLM,
        "packed-weights",
        told("the 16-bit model that it was quantized from", "$packed", "$base"),
    ),
    Row(
        "a base whose tensors are dropped",
        run_of(then=dropped),
        "adapter-without-base",
        told("take that line out of `drop`", 'drop: ["base:model.layers.0.self_attn.q_proj.weight"]\n', ""),
    ),
]


def two_models(folder: Path) -> None:
    """A base that holds a policy and its reference."""
    path = folder / "base/model.safetensors"
    both = {f"{where}.{name}": one.clone() for name, one in load_file(path).items() for where in ("actor", "ref")}
    save_file(both, path)
    unknown(folder)


def unknown(folder: Path) -> None:
    (folder / "base/config.json").write_text('{"model_type": "mine"}')


def another_part(folder: Path) -> None:
    """Modules of a decoder, and a base that has an encoder."""
    for path, words in ((folder / "base/model.safetensors", "encoder"), (folder / "lora" / WEIGHTS, "decoder")):
        state = {name.replace("model.layers", f"model.{words}.layers"): one for name, one in load_file(path).items()}
        save_file(state, path)
    unknown(folder)


def fused(folder: Path) -> None:
    """An adapter of single experts, a base with one tensor for all, and the model that this was made from."""
    (folder / "single").mkdir()
    name = "model.layers.0.mlp.experts."
    save_file(
        {f"{name}{which}.down_proj.weight": torch.ones(4, 4) for which in (0, 1)}, folder / "single/model.safetensors"
    )
    save_file({f"{name}down_proj": torch.ones(2, 4, 4)}, folder / "base/model.safetensors")
    unknown(folder)
    shutil.copy(folder / "base/config.json", folder / "single")
    pairs = [f"base_model.model.{name}{which}.down_proj.lora_" for which in (0, 1)]
    parts = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    state = {f"{pair}{part}.weight": one.clone() for pair in pairs for part, one in parts.items()}
    save_file(state, folder / "lora" / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))


def line_of(words: str) -> Follow:
    """Pastes the first line of the hint that has these words into the adapter's."""
    return lambda call: call.change("onto: base", f"onto: base, {next(one for one in call.ticked() if words in one)}")


def saying(rename: str) -> Given:
    return run_of(lines=[f"from: lora, onto: base, rename: {{{rename}}}"])


BASES += [
    Row("two models in one base", run_of(then=two_models), "adapter-names", line_of("ref")),
    Row("modules of another part", run_of(then=another_part), "adapter-without-base", line_of("encoder")),
    Row(
        "single experts onto fused ones",
        run_of(then=fused),
        "adapter-without-base",
        told("the model with a tensor for each expert", "base: base", "base: single"),
    ),
    Row(
        "a renaming that no module has",
        saying('"modle.{rest...}": "model.{rest...}"'),
        "unused-rename",
        by_hand("as `found` has them", lambda call: call.change("modle.", "model.")),
    ),
    Row(
        "a renaming to names that the base lacks",
        saying('"model.{rest...}": "modle.{rest...}"'),
        "adapter-without-base",
        by_hand("correct the line under `rename:`", lambda call: call.change("modle.", "model.")),
    ),
    Row(
        "a renaming of unequal sides",
        saying('"model.{rest...}": "{other...}"'),
        "odd-rename",
        by_hand("both sides alike", lambda call: call.change("{other...}", "model.{rest...}")),
    ),
]


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


ROWS = [*BASES, *MAPPING]
