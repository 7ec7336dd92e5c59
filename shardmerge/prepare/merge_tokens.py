"""Tokenizers of the models of a merge, read whole: what `init` needs to say which row of which model a token has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shardmerge.errors import UsageError
from shardmerge.mapping.yaml_nodes import Items, Mark, Node, Scalar, Table, json_value
from shardmerge.mergekit.config import MergeConfig, ModelName, not_sayable
from shardmerge.mergekit.vocabulary import JointVocabulary, ModelVocabulary, TokenChoice
from shardmerge.targets.any_model import over_vocabulary
from shardmerge.targets.config_numbers import load_object, parsed_object
from shardmerge.tensors import Catalog, Extent, ReadSideFile

_KEYS = ("source", "tokens", "pad_to_multiple_of")


def joint_vocabulary(config: MergeConfig, catalogs: Mapping[str, Catalog], read: ReadSideFile) -> JointVocabulary:
    """Returns the vocabulary that a merge asks for.

    Parameters
    ----------
    config
        Its ``tokenizer`` is ``base``, ``union``, a model, or a table with ``source`` and ``tokens``.
    catalogs
        By model, as the configuration writes it.

    Raises
    ------
    ShardmergeError
        ``not-sayable``, and ``no-tokenizer`` for a model without tokenizer.json.
    """
    node = config.tokenizer
    assert node is not None  # asked for only where it is said
    source, tokens, multiple, mark = _said(node)
    first = config.base or next(iter(catalogs))
    models = {model: _model(model, catalog, read) for model, catalog in catalogs.items()}
    for other in (one.model for one in tokens.values() if one.model and one.model not in models):
        raise not_sayable(f"rows of {other}, which is not merged", mark, "name one of the models")
    origin = first if source in ("base", "union") else source
    if origin != first:
        what = f"the tokenizer of {source} with the config.json of {first}"
        raise not_sayable(what, mark, "write `base`, and put that tokenizer into the result")
    known = _in_order(models[origin], mark)
    others = (token for one in models.values() for token in _by_id(one)) if source == "union" else ()
    new = [token for token in dict.fromkeys((*others, *tokens)) if token not in models[origin].ids]
    pad = -(len(known) + len(new)) % multiple
    return JointVocabulary(origin, [*known, *new], new, models, config.base, tokens, pad, mark)


def _said(node: Node) -> tuple[str, dict[str, TokenChoice], int, Mark]:
    """Returns the source, what is said of single tokens, and of which number the rows are a multiple."""
    if isinstance(node, Scalar):
        return node.text, {}, 1, node.mark
    fields = {key.text: value for key, value in node.entries} if isinstance(node, Table) else {}
    odd = sorted({*fields} - {*_KEYS}) or ([] if fields else ["a tokenizer that is a list"])
    if odd or isinstance(node, Items):
        raise not_sayable(f"`tokenizer: {', '.join(odd)}`", node.mark, "write `source`, `tokens`")
    multiple = json_value(fields["pad_to_multiple_of"]) if "pad_to_multiple_of" in fields else None
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        what = f"`pad_to_multiple_of: {multiple}`"
        raise not_sayable(what, fields["pad_to_multiple_of"].mark, "write a number of rows, as 64")
    source = json_value(fields["source"]) if "source" in fields else "union"
    tokens = json_value(fields["tokens"]) if "tokens" in fields else {}
    if not isinstance(source, str) or not isinstance(tokens or {}, dict):
        raise not_sayable("this `tokenizer`", node.mark)
    assert isinstance(tokens, dict | None)
    chosen = {token: _choice(value, node.mark) for token, value in (tokens or {}).items()}
    return source, chosen, multiple or 1, node.mark


def _choice(value: object, mark: Mark) -> TokenChoice:
    """Returns what is said of a token: a model, ``kind: zero``, or ``kind: model_token`` with its model and row."""
    if not isinstance(value, dict) or set(value) - {"source", "force"}:
        raise not_sayable("this entry of `tokens`", mark, "write `{source: MODEL}`")
    source, force = value.get("source"), value.get("force") is True
    if isinstance(source, str):
        return TokenChoice(source, force=force)
    if isinstance(source, dict) and source.get("kind") == "zero":
        return TokenChoice(force=force)
    if isinstance(source, dict) and source.get("kind") == "model_token" and isinstance(source.get("model"), str):
        row, token = source.get("token_id"), source.get("token")
        return TokenChoice(source["model"], row if isinstance(row, int) else None, str(token or ""), force)
    raise not_sayable("this source of a token", mark, "write `{source: MODEL}` or `{source: {kind: zero}}`")


def _model(model: str, catalog: Catalog, read: ReadSideFile) -> ModelVocabulary:
    for name in ("tokenizer.json", "config.json"):
        if name not in catalog.side_files:
            what = f"{ModelName.of(model).path} has no {name}, and the merge asks for one vocabulary"
            hint = "save the tokenizer as a fast one, or leave `tokenizer` out of the configuration"
            raise UsageError("no-tokenizer", what, where=catalog.path, hint=hint)
    config = load_object(catalog.side_files["config.json"], read)
    text = config.get("text_config")
    stated = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else 0)
    rows = stated if isinstance(stated, int) else 0
    tensors = {name: (catalog[name].dtype.torch, shape) for name, shape in over_vocabulary(catalog, rows)}
    return ModelVocabulary(model, dict(_tokens(catalog.side_files["tokenizer.json"], read)), rows, tensors)


def _tokens(extent: Extent, read: ReadSideFile) -> Iterator[tuple[str, int]]:
    """Yields all tokens of a tokenizer.json with their ids; of the tokenizers library's three ways to list them."""
    found: dict[str, Any] = parsed_object(read(extent), extent.file)
    if not isinstance(found.get("model"), dict):
        raise UsageError("no-tokenizer", "tokenizer.json holds no model", where=extent.file)
    vocabulary = found["model"].get("vocab") or {}
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((piece[0], place) for place, piece in enumerate(vocabulary))
    yield from ((one["content"], one["id"]) for one in found.get("added_tokens") or ())


def _by_id(one: ModelVocabulary) -> list[str]:
    return [token for token in sorted(one.ids, key=one.ids.__getitem__) if one.row(token) is not None]


def _in_order(one: ModelVocabulary, mark: Mark) -> list[str]:
    """Returns the tokens by id, those without a row left out; raises where an id is missing or there twice."""
    tokens = _by_id(one)
    if len(tokens) < len(one.ids):
        raise not_sayable(f"a tokenizer with tokens that have no row: that of {one.model}", mark)
    if [one.ids[token] for token in tokens] != list(range(len(tokens))):
        what = f"a tokenizer whose ids have gaps: that of {one.model}"
        raise not_sayable(what, mark)
    return tokens
