"""The target ``original/internvl``: a directory of InternVLChatModel, whose code lies beside its weights.

The directory that the model comes from says what it must hold: its names and shapes, config.json, code and tokenizer.
No version of transformers has that class, so nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets import any_model
from shardmerge.targets.config_numbers import JsonObject, load_object
from shardmerge.targets.expectation import Expectation, Request, Target, described_by
from shardmerge.tensors import Catalog

# What transformers writes of a language model, and the original: InternLM2 is a LLaMA there.
_ALIKE = {"internlm2": "llama"}

# What has to be the same on both sides, by the key of the part in transformers' config and in the original's.
_SAME = {
    ("text_config", "llm_config"): (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "rms_norm_eps", "vocab_size",
    ),
    ("vision_config", "vision_config"): (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
    ),
}  # fmt: skip


def expect(request: Request) -> Expectation:
    """Returns what the finished directory must hold: what the original holds.

    Raises
    ------
    TargetError
        ``missing-source``, ``unsupported-architecture``, ``contradiction``, or what ``any_model.expect`` raises.
    """
    source = request.roles.get("original", "original")
    made = any_model.expect(replace(request, roles={"text": source}))
    catalog = request.catalogs[source]
    where = catalog.side_files["config.json"].file
    config = load_object(catalog.side_files["config.json"], request.read)
    if config.get("model_type") != "internvl_chat" or not catalog.entries:
        raise TargetError(
            "unsupported-architecture",
            "`original` must be an original InternVL, and this is not one",
            where=catalog.path,
            found=f"model_type {shown(config.get('model_type'))}, {len(catalog.entries)} tensors",
            expected="model_type internvl_chat, with its weights",
            hint="download the InternVLChatModel directory that the model was made of, and name it as `original`",
        )
    _check_same(request, config, where)
    tensors = {name: catalog[name].shape for name in catalog.names()}
    return replace(made, tensors=tensors, open=False, components=(described_by("", where),))


def _check_same(request: Request, original: JsonObject, where: str) -> None:
    """Checks that both configs describe a model of the same sizes."""
    catalog = request.catalogs.get(request.roles.get("model", "model"))
    if catalog is None or "config.json" not in catalog.side_files:
        return
    config = load_object(catalog.side_files["config.json"], request.read)
    odd = list(_differences(config, original))
    if odd:
        raise TargetError(
            "contradiction",
            "the original is of another model",
            where=where,
            found="; ".join(odd),
            expected=f"the numbers of {_file(catalog)}",
            hint="name the InternVLChatModel directory that the model was made of as `original`",
        )


def _differences(config: JsonObject, original: JsonObject) -> Iterator[str]:
    for (ours, theirs), keys in _SAME.items():
        here, there = config.get(ours), original.get(theirs)
        if not isinstance(here, dict) or not isinstance(there, dict):
            continue
        for key in keys:
            if key in here and key in there and here[key] != there[key]:
                yield f"{theirs}.{key} {shown(there[key])}, and {ours}.{key} {shown(here[key])}"
        kind = there.get("model_type")
        if ours == "text_config" and here.get("model_type") != _ALIKE.get(str(kind), kind):
            yield f"{theirs}.model_type {shown(kind)}, and {ours}.model_type {shown(here.get('model_type'))}"


def _file(catalog: Catalog) -> str:
    return catalog.side_files["config.json"].file


TARGET = Target(
    name="original/internvl",
    about="An InternVL as its authors publish it: `AutoModel.from_pretrained(..., trust_remote_code=True)` loads it.",
    roles={
        "original": "the InternVLChatModel directory whose names, config.json, code and tokenizer are taken",
        "model": "the model that is converted, whose config.json has to be of the same sizes",
    },
    options={},
    expect=expect,
)
