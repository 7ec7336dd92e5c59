"""Results that would not be what their config promises: counts, shapes, vocabularies, architectures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.following import RUN, Call, Row, by_hand
from tests.hint_rows.given import LAYOUTS, Given, changed, config, copied, edited, made, mapped, stored, told
from tests.test_mistakes import GQA, REST, XTUNER

LLAMA = "target: {name: hf/llama, text: m}\n"
LIKE = "target: {name: hf/model, text: m}\n"
CK = GQA.replace("$gqa", "ck")
HEAD = "lm_head.weight"


def without(*words: str) -> Callable[[Path], object]:
    """Takes tensors out of a model."""

    def do(folder: Path) -> None:
        path = folder / "model.safetensors"
        changed(path, lambda held: [held.pop(name) for name in [*held] if any(word in name for word in words)])

    return do


def of(source: str, text: str, then: Callable[[Path], object]) -> Given:
    """A changed copy of a checkpoint as ``ck``, and a mapping."""

    def before(call: Call) -> None:
        shutil.copytree(call.world[source], call.folder / "ck")
        then(call.folder / "ck")

    return mapped(text, before=before)


def renamed(old: str, new: str) -> Callable[[Path], object]:
    def do(folder: Path) -> None:
        path = folder / "model.safetensors"
        state = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
        stored(path, state)

    return do


def small(tensors: dict[str, torch.Tensor], **settings: object) -> Callable[[Call], object]:
    """A model of no known architecture."""
    return lambda call: stored(call.folder / "ck/model.safetensors", tensors, model_type="x", **settings)


LAYER = {"layers.0.w.weight": torch.ones(4, 4), "layers.1.w.weight": torch.ones(4, 4)}
HALF = {"layers.0.w.weight": torch.ones(4, 4)}


def with_base(call: Call) -> None:
    """Writes the mapping that the hint spells."""
    base = call.world["gqa"]
    call.write(
        f"shardmerge: 1\nsources: {{trained: ck, base: {base}}}\noutput: out\n" + "\n".join(call.ticked()[:2]) + "\n"
    )
    call.args = list(RUN)


def paste_config(call: Call) -> None:
    """Puts the line for `config` into the mapping."""
    call.add(next(one for one in call.ticked() if one.startswith("config:")))


def correct(call: Call) -> None:
    """Corrects the key in the file that the hint names."""
    key, value = call.ticked()[0], call.hint.partition("` to ")[2].split()[0]
    assert str(call.folder / "ck/config.json") in call.hint
    edited("config.json", **{key: {"true": True, "false": False}.get(value) if value.isalpha() else int(value)})(
        call.folder / "ck"
    )


AGREEMENT = [
    Row(
        "a layer that is missing",
        copied("gqa", then=without("layers.1.")),
        "incomplete-model",
        by_hand("as another source of a mapping", with_base),
    ),
    Row(
        "a layer that is missing, and meant to be",
        copied("gqa", then=without("layers.1.")),
        "incomplete-model",
        lambda call: call.args.append(call.hint.partition("--partial")[1]),
    ),
    Row(
        "a layer that is missing of an unknown model",
        made(small(HALF, num_hidden_layers=2)),
        "incomplete-model",
        lambda call: call.args.append(call.hint.partition("--partial")[1]),
    ),
    Row(
        "a layer too many",
        copied("gqa", then=edited("config.json", num_hidden_layers=1)),
        "config-disagrees",
        by_hand("correct `num_hidden_layers` to 2", correct),
    ),
    Row(
        "a layer too many, in a mapping",
        of("gqa", LIKE + CK + REST, edited("config.json", num_hidden_layers=1)),
        "config-disagrees",
        paste_config,
    ),
    Row(
        "a layer too many of an unknown model",
        made(small(LAYER, num_hidden_layers=1)),
        "config-disagrees",
        by_hand("correct `num_hidden_layers` to 2", correct),
    ),
    Row(
        "sizes that contradict each other",
        copied("gqa", then=edited("config.json", hidden_size=64)),
        "config-disagrees",
        config("ck/config.json", "correct `hidden_size`", hidden_size=32),
    ),
    Row(
        "heads that do not divide",
        copied("gqa", then=edited("config.json", num_attention_heads=5, head_dim=None)),
        "odd-config",
        config("ck/config.json", "correct the one that does not describe", num_attention_heads=4),
    ),
    Row(
        "a key that is not there",
        LIKE + GQA + REST + "config: {remove: [rope_thetaa]}\n",
        "no-such-key",
        lambda call: call.change("config: {remove: [rope_thetaa]}\n", ""),
    ),
]

SHAPES = [
    Row(
        "a model of another size",
        LLAMA.replace("m}", "c}")
        + "sources: {m: $llm, c: $gqa}\noutput: out\ntensors:\n"
        + REST
        + 'drop: ["c:{rest...}"]\n',
        "shape-mismatch",
        told("name as `m` the model", "$llm", "$gqa"),
    ),
    Row(
        "head and embedding of different rows",
        LLAMA + GQA.replace("$gqa", "$ragged") + REST,
        "shape-mismatch",
        lambda call: call.add(call.ticked()[0]),
    ),
    Row(
        "fewer rows than the model has",
        LLAMA + "vocabulary: {rows: 100}\n" + GQA + REST,
        "vocabulary-rows",
        lambda call: call.change("vocabulary: {rows: 100}", call.hint),
    ),
    Row(
        "fewer rows than the tokens need",
        XTUNER + "vocabulary: {rows: 299, trim: true}\n",
        "vocabulary-rows",
        lambda call: call.change("vocabulary: {rows: 299, trim: true}", call.hint),
    ),
    Row(
        "a padding token without a row",
        of("gqa", LLAMA + CK + REST, edited("config.json", pad_token_id=500)),
        "token-id",
        lambda call: call.add(call.hint),
    ),
    Row(
        "a vocabulary of unknown tensors",
        mapped(
            LIKE + CK + REST + "vocabulary: {rows: 8}\n", before=small({"emb.weight": torch.ones(4, 4)}, vocab_size=4)
        ),
        "no-vocabulary",
        lambda call: (
            call.change("vocabulary: {rows: 8}\n", "config: {set: {vocab_size: 8}}\n"),
            call.change("tensors:\n", f"tensors:\n  {call.ticked()[2].replace('NAME', 'emb.weight')}\n"),
        ),
    ),
    Row(
        "a tensor of a name that is nearly right",
        of("gqa", LLAMA + CK + REST, renamed(HEAD, "lm_head.wieght")),
        "missing-tensor",
        lambda call: call.change(
            "tensors:\n", f"tensors:\n  lm_head.weight: {call.hint.partition('near names: ')[2].split(',')[0]}\n"
        ),
        "unexpected-target",
    ),
    Row(
        "a tensor that nothing is like",
        of(
            "gqa",
            LLAMA + CK + REST,
            lambda folder: changed(
                folder / "model.safetensors", lambda held: (held.clear(), held.update({"q0815": torch.ones(2)}))
            ),
        ),
        "missing-tensor",
        told("add a source that has them", "m: ck", "m: $gqa"),
    ),
    Row(
        "a part that has no source",
        of(
            "gqa",
            LLAMA + CK + REST,
            lambda folder: changed(
                folder / "model.safetensors", lambda held: (held.clear(), held.update({"q0815": torch.ones(2)}))
            ),
        ),
        "missing-component",
        told("name a source that has them", "m: ck", "m: $gqa"),
    ),
    Row(
        "a part that is dropped",
        LLAMA + GQA + REST + 'drop: ["m:model.{rest...}"]\n',
        "missing-component",
        told("take that line out of `drop`", 'drop: ["m:model.{rest...}"]\n', ""),
    ),
]

FAMILIES = [
    Row(
        "a class of another family",
        of("gqa", LLAMA + CK + REST, edited("config.json", architectures=["GraniteForCausalLM"])),
        "unsupported-architecture",
        config("ck/config.json", "correct `architectures`", architectures=["LlamaForCausalLM"]),
    ),
    Row(
        "a base that is not the one of the training",
        mapped(
            f"sources: {{megatron: {LAYOUTS}/megatron_tp2_pp1_mha/source, base: ck}}\noutput: out\n"
            "use: llama/megatron-to-hf\n",
            before=lambda call: (
                shutil.copytree(LAYOUTS / "megatron_tp2_pp1_mha/truth", call.folder / "ck"),
                edited("config.json", rms_norm_eps=0.5)(call.folder / "ck"),
            ),
        ),
        "contradiction",
        told("name the base that the training started from", "base: ck", f"base: {LAYOUTS}/megatron_tp2_pp1_mha/truth"),
    ),
    Row(
        "a CLIP that nothing describes",
        mapped(
            "sources: {clip: ck.bin}\noutput: out\nuse: clip/open-clip-to-hf\n",
            before=lambda call: shutil.copy(
                call.world["openclip"] / "open_clip_pytorch_model.bin", call.folder / "ck.bin"
            ),
        ),
        "missing-source",
        lambda call: call.change(
            "clip: ck.bin", "clip: ck.bin, " + call.hint.partition("<")[0] + str(LAYOUTS / "open_clip_published/truth")
        ),
    ),
]

ROWS = [*AGREEMENT, *SHAPES, *FAMILIES]
