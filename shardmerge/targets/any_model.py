"""The target ``hf/model``: a Hugging Face directory of an architecture that is not known here.

Names and shapes are whatever the rules make; config and tokenizer are the source's own, with type and vocabulary
brought up to date. That config and tensors agree is checked for every target alike (``targets.agreement``).
"""

from __future__ import annotations

from collections.abc import Iterator

from shardmerge.errors import TargetError
from shardmerge.targets import tokenizer
from shardmerge.targets.config_numbers import JsonObject, dimension, dump, load_object
from shardmerge.targets.expectation import Expectation, Request, Target
from shardmerge.targets.options import config_of
from shardmerge.targets.quantization_config import without_quantization
from shardmerge.targets.tokenizer import TokenizerFiles
from shardmerge.targets.vocabulary import rows
from shardmerge.tensors import Catalog, Shape, SideFile
from shardmerge.tensors.vocabulary_names import OVER_VOCABULARY

# Those of Meta's names, too.
_VOCABULARY = (*OVER_VOCABULARY, "tok_embeddings.weight")


def expect(request: Request) -> Expectation:
    """Returns what is known of the finished directory: its files, and the tensors that a vocabulary resizes.

    Raises
    ------
    TargetError
        ``missing-source``, ``bad-json``, ``odd-config``, ``vocabulary-rows``, or what the tokenizer's files raise.
    """
    catalog, extent = config_of(request, "text", "has a config.json to copy")
    config = load_object(extent, request.read)
    if request.dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = request.dtype.torch
    if catalog.dequantized:
        config = without_quantization(config)
    if request.vocabulary is None:
        rewritten = request.dtype is not None or catalog.dequantized
        content = dump(config, sort=False) if rewritten else extent
        made = (SideFile("config.json", (content,)), *_template(request))
        return Expectation({}, side_files=made, beside=catalog.side_files, same_model=True, open=True)
    return _resized(request, catalog, config)


def _template(request: Request) -> Iterator[SideFile]:
    """Yields the chat template that the mapping states; loaders look for that file first."""
    text = request.options.get("chat_template")
    if text:
        yield SideFile("chat_template.jinja", (text.encode("utf-8"),))


def _resized(request: Request, catalog: Catalog, config: JsonObject) -> Expectation:
    """Returns the expectation with a vocabulary: config, tokenizer, embedding and head change together."""
    where = catalog.side_files["config.json"].file
    nested = config.get("text_config")
    part = nested if "vocab_size" not in config and isinstance(nested, dict) else config
    size = dimension(part, "vocab_size", 0, where)
    tokens = _tokens(request, catalog, size)
    counted = rows(request, size, tokens.ids.values())
    part["vocab_size"] = counted.count
    tensors = {name: (counted.count, *shape[1:]) for name, shape in over_vocabulary(catalog, size)}
    if not tensors:
        source = request.roles.get("text", "text")
        raise TargetError(
            "no-vocabulary",
            "no tensor of the source is a known embedding or head over the vocabulary",
            where=catalog.path,
            found=f"no name that ends in {', '.join(_VOCABULARY[:4])}, ... with {size} rows",
            hint="leave `vocabulary:` out, set vocab_size under `config:`, and write a rule for each such tensor, as "
            f'`NAME: {{op: concat, of: ["{source}:NAME", {{op: new_rows, of: "{source}:NAME", '
            f"rows: {max(counted.count - size, 1)}}}]}}`",
        )
    template = tuple(_template(request))
    others = (file for file in tokens.files if not template or file.name != template[0].name)
    made = (SideFile("config.json", (dump(config, sort=False),)), *others, *template)
    resized = counted.resized(tensors)
    return Expectation(tensors, resized=resized, side_files=made, beside=catalog.side_files, same_model=True, open=True)


def _tokens(request: Request, catalog: Catalog, size: int) -> TokenizerFiles:
    wanted = request.vocabulary
    if wanted is None or not wanted.tokens:
        return TokenizerFiles({}, ())
    return tokenizer.add_tokens(
        catalog.side_files,
        request.read,
        wanted.tokens,
        vocab_size=size,
        default_class="PreTrainedTokenizerFast",
        pad_token=wanted.pad,
    )


def over_vocabulary(catalog: Catalog, size: int) -> Iterator[tuple[str, Shape]]:
    """Yields the tensors that are known as embeddings or heads of so many rows."""
    for name in catalog.names():
        shape = catalog[name].shape
        if name.endswith(_VOCABULARY) and shape and shape[0] == size:
            yield name, shape


TARGET = Target(
    name="hf/model",
    about="A Hugging Face directory of any architecture, with the names and shapes that the rules produce.",
    roles={"text": "the source whose config.json and tokenizer files are copied"},
    options={"chat_template": "a Jinja template that replaces the tokenizer's chat template"},
    expect=expect,
    codes=True,
)
