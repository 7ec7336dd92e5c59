"""What LLaVA's own training leaves beside an adapter or a projector: the config.json of the run.

LLaVA's builder takes the wiring from there and not from the base (``load_pretrained_model``: ``cfg_pretrained``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject, load_object
from shardmerge.targets.expectation import Request
from shardmerge.targets.llava import official_config
from shardmerge.targets.llava.bases import TextBase
from shardmerge.targets.text_config import read_part, rope_scaling, with_v4_rope
from shardmerge.targets.tokenizer import has_tokenizer
from shardmerge.tensors import Catalog, Extent

ROLES = {
    "adapter": "an adapter of LLaVA's own training; the config.json beside it says how the projector is wired",
    "projector": "the projector of such a training, likewise",
}

# What two configs of one run have in common; the language model is compared whole.
_WIRING = (
    "image_aspect_ratio", "mm_patch_merge_type", "mm_projector_type", "mm_vision_select_feature",
    "mm_vision_select_layer", "mm_vision_tower",
)  # fmt: skip
# What a language model's tensors do not show, and what they do.
_STATED = ("hidden_act", "rms_norm_eps", "rope_theta", "sliding_window")
_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Whose word on the wiring counts.

    Attributes
    ----------
    config
        Of the run where there is one, else the text base's config.json.
    where
        Its file.
    side_files
        What else lies there.
    """

    config: JsonObject
    where: str
    side_files: Mapping[str, Extent]


def read_run_settings(request: Request, text: TextBase) -> RunSettings:
    """Returns the settings of the run that an adapter or a projector comes from, else those of the text base.

    Raises
    ------
    TargetError
        ``contradiction``: two runs differ, or the run had another language model. ``unsupported-architecture``,
        ``bad-json``.
    """
    runs = list(_runs(request))
    for one in runs:
        _check_language_model(one, text)
        _check_same(runs[0], one)
    return runs[0] if runs else RunSettings(text.whole, text.where, text.catalog.side_files)


def _runs(request: Request) -> Iterator[RunSettings]:
    for role in ROLES:
        catalog = request.catalogs.get(request.roles.get(role, role))
        extent = catalog.side_files.get("config.json") if catalog is not None else None
        if catalog is None or extent is None:
            continue
        config = load_object(extent, request.read)
        if official_config.is_official(config):
            yield RunSettings(config, extent.file, catalog.side_files)


def _check_same(first: RunSettings, other: RunSettings) -> None:
    odd = [key for key in _WIRING if first.config.get(key) != other.config.get(key)]
    if odd:
        raise _contradiction("the adapter and the projector come from runs of different settings", odd, first, other)


def _check_language_model(run: RunSettings, text: TextBase) -> None:
    config = official_config.language_part(run.config, run.where)
    found = read_part(config, run.where)
    ours, theirs = with_v4_rope(config, found, run.where), with_v4_rope(text.config, text.architecture, text.where)
    # Rows differ where tokens were added.
    models = (found, text.architecture)
    one, other = (each.changed(vocab_size=1, tie_word_embeddings=False, num_labels=1) for each in models)
    odd = [key for key in _STATED if key in ours and key in theirs and ours[key] != theirs[key]]
    odd += ["rope_scaling"] if rope_scaling(ours) != rope_scaling(theirs) else []
    if one != other:
        odd = [key for key in _SIZES if ours.get(key) != theirs.get(key)] or ["num_key_value_heads", "head_dim"]
    if odd:
        what = "the run had another language model than the source has"
        raise _contradiction(what, odd, replace(run, config=ours), RunSettings(theirs, text.where, {}))


def _contradiction(what: str, keys: list[str], first: RunSettings, other: RunSettings) -> TargetError:
    return TargetError(
        "contradiction",
        what,
        where=first.where,
        found=", ".join(f"{key} {shown(first.config.get(key), 60)}" for key in keys),
        expected=", ".join(f"{key} {shown(other.config.get(key), 60)}" for key in keys) + f", as {other.where} says",
        hint=f"name sources that belong together, or write the values that hold into a copy of {other.where}",
    )


def tokenizer_source(settings: RunSettings, text: TextBase) -> Mapping[str, Extent]:
    """Returns the files among which the tokenizer's are: those beside the run, else those of the text base."""
    return settings.side_files if has_tokenizer(settings.side_files) else text.catalog.side_files


def processor_source(settings: RunSettings, vision: Catalog) -> Mapping[str, Extent]:
    """Returns the files among which the image processor's is: those beside the run, else those of the encoder."""
    return settings.side_files if "preprocessor_config.json" in settings.side_files else vision.side_files
