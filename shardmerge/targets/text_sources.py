"""The config of a language model, from whichever file or facts its source has."""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.targets import foreign_configs, megatron_args, rewritten_configs
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.config_numbers import JsonObject, load_object
from shardmerge.targets.expectation import Request
from shardmerge.targets.llava import official_config
from shardmerge.targets.megatron_args import has_args
from shardmerge.targets.tables import model_types
from shardmerge.targets.yaml_files import load_yaml
from shardmerge.tensors import Catalog, ReadSideFile

_PARAMS, _LITGPT = "params.json", "model_config.yaml"


@dataclass(frozen=True, slots=True)
class TextSource:
    """A language model, described.

    Attributes
    ----------
    catalog
        The source.
    config
        As transformers would have it.
    architecture
        Its sizes.
    where
        The file that says so.
    kind
        Whose description it is: ``hf``, ``hf-part`` (of a LLaVA's), ``meta``, ``litgpt``, ``megatron``.
    warnings
        What the description cannot carry over.
    """

    catalog: Catalog
    config: JsonObject
    architecture: Architecture
    where: str
    kind: str
    warnings: tuple[str, ...] = ()


def read_text_source(request: Request, default: str = "text", *, as_llama: bool = True) -> TextSource:
    """Returns the source that plays ``text``, or, where the mapping lacks it, the only one that describes itself.

    Parameters
    ----------
    request
        What the target is asked for.
    default
        The source where the mapping does not say it.
    as_llama
        Whether Phi-3 and InternLM2 are described as the LLaMA that they are once their fused layers are split.

    Raises
    ------
    TargetError
        ``missing-source``, ``bad-json``, ``bad-yaml``, ``unsupported-architecture``, ``odd-config``.
    """
    name = request.roles.get("text", default)
    catalog = request.catalogs.get(name)
    if catalog is None:
        able = [each for each in request.catalogs.values() if _describes(each)]
        catalog = able[0] if len(able) == 1 else None
    if catalog is None or not _describes(catalog):
        raise TargetError(
            "missing-source",
            f"no source describes the language model: `{name}` should",
            where=catalog.path if catalog else request.where,
            expected=f"a source `{name}` with config.json, {_PARAMS}, {_LITGPT} or Megatron's args",
        )
    found = _read(catalog, request.read, as_llama=as_llama)
    if found.kind.startswith("hf"):
        for each in request.catalogs.values():
            megatron_args.check_config(found.config, found.architecture, each, found.where)
    return found


def _describes(catalog: Catalog) -> bool:
    files = catalog.side_files
    return any(name in files for name in ("config.json", _PARAMS, _LITGPT)) or has_args(catalog)


def _read(catalog: Catalog, read: ReadSideFile, *, as_llama: bool) -> TextSource:
    files = catalog.side_files
    warnings: tuple[str, ...] = ()
    if "config.json" in files:
        where = files["config.json"].file
        whole = load_object(files["config.json"], read)
        config = _own(whole, where)
        kind = "hf" if config is whole else "hf-part"
        config, warnings = rewritten_configs.as_llama(config, where) if as_llama else (config, ())
    elif _PARAMS in files:
        kind, where = "meta", files[_PARAMS].file
        rows, tied = foreign_configs.meta_rows(catalog), foreign_configs.meta_is_tied(catalog)
        config = foreign_configs.from_params(load_object(files[_PARAMS], read), rows, tied=tied, where=where)
    elif _LITGPT in files:
        kind, where = "litgpt", files[_LITGPT].file
        config = foreign_configs.from_litgpt(load_yaml(files[_LITGPT], read), where)
    else:
        kind, where = "megatron", catalog.path
        config = megatron_args.from_megatron(catalog.facts, where)
    return TextSource(catalog, config, read_architecture(config, where, model_types("text")), where, kind, warnings)


def _own(whole: JsonObject, where: str) -> JsonObject:
    """Returns the language model's config: the whole, or the part that a LLaVA has of it."""
    nested = whole.get("text_config")
    if official_config.is_official(whole):
        return official_config.language_part(whole, where)
    return nested if isinstance(nested, dict) else whole
