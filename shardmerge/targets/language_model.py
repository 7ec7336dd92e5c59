"""The targets ``hf/text`` and ``hf/llama``: a directory that ``AutoModelForCausalLM.from_pretrained`` loads.

Any text model that has a table (``targets/architectures/``). In the first, Phi-3 and InternLM2 keep their layout; in
the second they are LLaMAs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shardmerge.compose import own_dtype
from shardmerge.targets import megatron_args
from shardmerge.targets.config_numbers import JsonObject, dump, stored_dtype
from shardmerge.targets.expectation import Expectation, Request, Target, described_by
from shardmerge.targets.generation_config import generation_config
from shardmerge.targets.options import choice, whole_number
from shardmerge.targets.text_config import text_config
from shardmerge.targets.text_sources import TextSource, read_text_source
from shardmerge.targets.vocabulary import VocabularyRows, id_warnings, rows, tokenizer_files
from shardmerge.tensors import SideFile

_UNREAD = "no version of transformers loads it: `target: {name: hf/model, text: SOURCE}` keeps it"
_MAX_CONTEXT = 1 << 26
# What of config.json says how to generate.
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")


def expect_llama(request: Request) -> Expectation:
    """Returns what the directory of a model of the LLaMA layout must hold; raises as ``expect``."""
    return expect(request, as_llama=True)


def expect(request: Request, *, as_llama: bool = False) -> Expectation:
    """Returns what the finished directory must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``unsupported-architecture``, ``odd-config``, ``bad-json``, ``bad-yaml``, ``bad-option``,
        ``vocabulary-rows``, or what the tokenizer's files raise.
    """
    text = _tied_or_not(request, read_text_source(request, as_llama=as_llama))
    tokens_of = request.catalogs.get(request.roles.get("tokenizer", "tokenizer"), text.catalog)
    side_files = tokens_of.side_files
    warnings = text.warnings
    if text.kind == "meta" and "tokenizer.json" not in side_files and "tokenizer.model" in side_files:
        tiktoken = not request.read(side_files["tokenizer.model"].slice(0, 1)).startswith(b"\n")
        if tiktoken:
            side_files = {name: extent for name, extent in side_files.items() if name != "tokenizer.model"}
            warnings = (*warnings, _tiktoken_warning(tokens_of.path))
    tokens = tokenizer_files(request, side_files, text.architecture)
    counted = rows(request, text.architecture.vocab_size, tokens.ids.values())
    model = text.architecture.changed(vocab_size=counted.count)
    over_vocabulary = [name for pair in model.table.tied for name in pair if name not in model.ties]
    warnings = (*warnings, *id_warnings(text.config, counted.count, text.where), *_padding(request, text, counted))
    return Expectation(
        tensors=model.tensors(),
        resized=counted.resized(over_vocabulary),
        tied=model.ties,
        side_files=(
            SideFile("config.json", (dump(_config(request, text, counted)),)),
            *generation_config(text.catalog, text.config, request.read, tokens=_GENERATION),
            *tokens.files,
        ),
        beside=tokens_of.side_files,
        same_model=not as_llama and text.kind == "hf" and tokens_of is text.catalog,
        left_out=dict.fromkeys(model.unread(text.catalog.entries), _UNREAD),
        components=(described_by("model.", text.where),),
        warnings=warnings,
    )


def _tied_or_not(request: Request, text: TextSource) -> TextSource:
    asked = choice(request, "tie", ("keep", "true", "false"))
    tied = text.architecture.tied if asked == "keep" else asked == "true"
    return replace(text, architecture=text.architecture.changed(tie_word_embeddings=tied))


def _padding(request: Request, text: TextSource, counted: VocabularyRows) -> Iterator[str]:
    """Says what becomes of the rows that Megatron adds to the vocabulary; a user who says a number has decided."""
    for catalog in request.catalogs.values() if request.vocabulary is None else ():
        stated = text.kind != "megatron" or "vocab_size" in catalog.facts
        said = megatron_args.padding(catalog, counted.count, stated=stated)
        if said:
            yield said


def _config(request: Request, text: TextSource, counted: VocabularyRows) -> JsonObject:
    dtype = request.dtype.torch if request.dtype else stored_dtype(text.config) or _stored(text)
    config = text_config(text.config, text.architecture, counted.count, dtype, text.where)
    context = whole_number(request, "context", 0, most=_MAX_CONTEXT)
    if context:
        config["max_position_embeddings"] = context
    if text.architecture.table.own_code and "auto_map" in text.config:
        config["auto_map"] = text.config["auto_map"]
    return config | {"architectures": [text.architecture.table.main_class]}


def _stored(text: TextSource) -> str:
    """Returns the type of the weights, where they all have one."""
    types = {own_dtype(entry).torch for entry in text.catalog.entries.values() if entry.dtype.kind == "float"}
    return types.pop() if len(types) == 1 else ""


def _tiktoken_warning(path: str) -> str:
    return (
        f"{path}/tokenizer.model is LLaMA 3's own kind of file, which transformers does not load, and is not copied. "
        "Name a source with the tokenizer.json of the same model: `tokenizer: <directory>`"
    )


_ROLES = {
    "text": "what describes it: config.json, Meta's params.json, litgpt's model_config.yaml, Megatron's args",
    "tokenizer": "the source with the tokenizer's files, where it is another",
}
_OPTIONS = {
    "context": "`max_position_embeddings`, where the description does not say it (Meta's does not)",
    "tie": "`keep`; `true`: the head is the embedding and is not written; `false`: it is written",
}

TEXT_TARGET = Target(
    name="hf/text",
    about="A language model of any supported architecture for transformers, in its own layout.",
    roles=_ROLES,
    options=_OPTIONS,
    expect=expect,
)

TARGET = Target(
    name="hf/llama",
    about="Like `hf/text`, but a Phi-3 or an InternLM2 becomes a LLaMA: its fused layers are split.",
    roles=_ROLES,
    options=_OPTIONS,
    expect=expect_llama,
)
