"""The small files of a tokenizer, edited for new tokens.

tokenizer_config.json, special_tokens_map.json and added_tokens.json, as transformers 4 and 5 read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.targets.config_numbers import JsonObject, dump, load_object
from shardmerge.targets.token_ids import AddedTokens, special_flags
from shardmerge.tensors import Extent, ReadSideFile, SideFile


@dataclass(frozen=True, slots=True)
class ConfigNames:
    """What tokenizer_config.json is to name; ``""`` for what it names already."""

    pad_token: str
    default_class: str
    processor_class: str


def load_side_object(side_files: Mapping[str, Extent], read: ReadSideFile, name: str) -> JsonObject | None:
    """Returns what a small JSON file holds, None where there is none."""
    return load_object(side_files[name], read) if name in side_files else None


def edit_configs(
    side_files: Mapping[str, Extent], read: ReadSideFile, added: AddedTokens, names: ConfigNames
) -> list[SideFile]:
    """Returns the small files with the new tokens, made where the tokenizer needs one and has none."""
    slow_only = "tokenizer.json" not in side_files
    special = load_side_object(side_files, read, "special_tokens_map.json")
    legacy = load_side_object(side_files, read, "added_tokens.json")
    config = load_side_object(side_files, read, "tokenizer_config.json") or {}
    if slow_only and "added_tokens_decoder" not in config:
        config = _with_decoder(config, special or {}, legacy or {})
    edited = {"tokenizer_config.json": _edit_config(config, added, names)}
    if special is not None:
        edited["special_tokens_map.json"] = _edit_special_tokens(special, names.pad_token)
    if legacy is not None or slow_only:
        edited["added_tokens.json"] = {**(legacy or {}), **{token: added.ids[token] for token in added.new}}
    return [SideFile(name, (dump(value, sort=False),)) for name, value in edited.items()]


def _with_decoder(config: JsonObject, special: JsonObject, legacy: JsonObject) -> JsonObject:
    """Returns a config with ``added_tokens_decoder``, and with what transformers stops reading once it is
    there.

    Without it, transformers 4.x takes the special tokens from special_tokens_map.json and the added ones from
    added_tokens.json (``PreTrainedTokenizerBase._from_pretrained``).
    """
    texts = {name: _content(token) for name, token in special.items()}
    listed = (value if isinstance(value, list) else [value] for value in texts.values())
    named = {text for texts_of_name in listed for text in texts_of_name if isinstance(text, str)}
    decoder = {
        str(number): special_flags() | {"content": token, "normalized": token not in named, "special": token in named}
        for token, number in legacy.items()
    }
    return {**config, **texts, "added_tokens_decoder": decoder}


def _content(token: object) -> object:
    """Returns the text of a special token, or of each in a list; anything else as it is."""
    if isinstance(token, list):
        return [_content(each) for each in token]
    return token.get("content") if isinstance(token, dict) else token


def _edit_config(config: JsonObject, added: AddedTokens, names: ConfigNames) -> JsonObject:
    edited = _without_v5_class(config)
    decoder = edited.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        new = {str(added.ids[token]): {"content": token, **special_flags()} for token in added.new}
        edited["added_tokens_decoder"] = {**decoder, **new}
    if names.pad_token:
        edited["pad_token"] = names.pad_token
    # Where no class is named transformers goes by config.json, and that one may now say llava.
    edited.setdefault("tokenizer_class", names.default_class)
    if edited["tokenizer_class"] == "PreTrainedTokenizerFast":
        # The generic class of 4.x also makes token_type_ids, which no LLaVA's generate() takes.
        edited.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if "processor_class" in edited and names.processor_class:
        edited["processor_class"] = names.processor_class
    return edited


def _without_v5_class(config: JsonObject) -> JsonObject:
    """Returns the config of a tokenizer saved by transformers 5 so that 4.x loads it too.

    4.x has no class TokenizersBackend, and no list of ``extra_special_tokens``: that was
    ``additional_special_tokens``, which 5.x still reads.
    """
    edited = dict(config)
    if edited.get("tokenizer_class") == "TokenizersBackend":
        edited["tokenizer_class"] = "PreTrainedTokenizerFast"
        edited.pop("backend", None)
    if isinstance(edited.get("extra_special_tokens"), list):
        edited.setdefault("additional_special_tokens", edited.pop("extra_special_tokens"))
    return edited


def _edit_special_tokens(special: JsonObject, pad_token: str) -> JsonObject:
    """Sets the pad token in the style of the file: bare strings, or objects with flags."""
    if not pad_token:
        return special
    if not any(isinstance(value, dict) for value in special.values()):
        return {**special, "pad_token": pad_token}
    flags = {key: value for key, value in special_flags().items() if key != "special"}
    return {**special, "pad_token": {"content": pad_token, **flags}}
