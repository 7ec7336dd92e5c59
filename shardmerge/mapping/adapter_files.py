"""What lies beside an adapter: the run's own tokenizer and processor are taken, its config.json is compared. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.mapping.near import listed
from shardmerge.shown import shown
from shardmerge.targets.architectures import JsonObject, load_object
from shardmerge.tensors import PEFT_ADAPTER, Catalog, Extent, ReadSideFile
from shardmerge.tensors.file_roles import CONFIG

# A tokenizer is a set of files: all are the adapter's, or all the base's. Its chat template is that of the run.
_TOKENIZER = (
    "tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab", "merges.txt", "chat_template", "spiece.model",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

# Says nothing of what a model computes: who wrote the file, and how it was run.
_OF_NO_WEIGHT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attn_implementation",
    "dtype", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip


def files_beside(
    adapter: Catalog, base: Catalog, config: JsonObject, names: tuple[str, str], read: ReadSideFile
) -> tuple[dict[str, Extent], tuple[str, ...]]:
    """Returns the base's side files with the adapter's in place of them, and what has to be said of that.

    Parameters
    ----------
    config
        The base's.
    names
        Of the sources: the adapter's, the base's.
    """
    files = dict(base.side_files)
    if adapter.kind != PEFT_ADAPTER or adapter.path == base.path:
        return files, ()
    source, onto = names
    warnings = []
    tokenizer = _chosen(adapter.side_files, _TOKENIZER)
    if "tokenizer_config.json" in tokenizer and any(name in tokenizer for name in _VOCABULARIES):
        files = {name: one for name, one in files.items() if not name.startswith(_TOKENIZER)} | tokenizer
        warnings.append(f"{source}: the tokenizer beside the adapter is taken, not that of {onto}")
    if processor := _chosen(adapter.side_files, _PROCESSORS):
        files |= processor
        warnings.append(f"{source}: {listed(list(processor))} beside the adapter taken, not that of {onto}")
    if config and CONFIG in adapter.side_files:
        own = load_object(adapter.side_files[CONFIG], read)
        odd = sorted(key for key in own.keys() & config.keys() - _OF_NO_WEIGHT if own[key] != config[key])
        if odd and "model_type" not in odd:  # the config of a model around the base is its target's matter
            warnings.append(
                f"{source}: config.json beside the adapter says otherwise than that of {onto}, which is taken: "
                + listed([f"{key} {shown(own[key], 60)}" for key in odd])
            )
    return files, tuple(warnings)


def _chosen(files: Mapping[str, Extent], starts: tuple[str, ...]) -> dict[str, Extent]:
    return {name: extent for name, extent in files.items() if name.startswith(starts)}
