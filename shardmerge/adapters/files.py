"""What lies beside an adapter: the run's own tokenizer and processor are taken, its config.json is compared. Pure."""

from __future__ import annotations

from shardmerge.mapping.near import listed
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject, load_object
from shardmerge.targets.tokenizer import has_tokenizer, is_tokenizer_file
from shardmerge.tensors import PEFT_ADAPTER, Catalog, Extent, ReadSideFile
from shardmerge.tensors.file_roles import CONFIG

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
    # A tokenizer is a set of files: all are the adapter's, or all the base's. Its chat template is that of the run.
    tokenizer = {name: extent for name, extent in adapter.side_files.items() if is_tokenizer_file(name)}
    if "tokenizer_config.json" in tokenizer and has_tokenizer(tokenizer):
        files = {name: one for name, one in files.items() if not is_tokenizer_file(name)} | tokenizer
        warnings.append(f"{source}: the tokenizer beside the adapter is taken, not that of {onto}")
    if processor := {name: extent for name, extent in adapter.side_files.items() if name in _PROCESSORS}:
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
