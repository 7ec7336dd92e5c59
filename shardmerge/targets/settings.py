"""Settings of a config that change the arithmetic: each is understood, without effect, or refused by its name.

A config that is copied under its own ``model_type`` is read by the class that wrote it. Where a target writes it for
another class (LLaVA's own code to transformers, InternLM2 to LLaMA) a setting that this class does not know would be
lost without a word: Granite's multipliers, Gemma's soft caps, MiniCPM's scales have the names and shapes of a LLaMA.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.tables import find_table

# `PreTrainedConfig` of transformers 4.51 to 5.23, and what versions before had: how to generate and to load.
ANY_MODEL = (
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention", "architectures",
    "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "quantization_config", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
)  # fmt: skip

# Values that stand for "not there" or "as it is" under any name: a multiplier of 1, a cap of null, no experts.
_IDLE = (None, False, 0, 1, "", "none", "default")


def refuse_unknown(config: Mapping[str, object], model_type: str, also: Collection[str], where: str) -> None:
    """Checks that a config has no setting that the class of ``model_type`` would ignore.

    Parameters
    ----------
    config
        Of a language model, under its keys.
    model_type
        What it is going to be written as.
    also
        Keys that whoever rewrites the config has read, or that do not matter there.
    where
        The file.

    Raises
    ------
    TargetError
        ``unsupported-architecture``.
    """
    table = find_table(model_type)
    own = (*table.fields, *table.other_fields) if table else ()
    odd = not_understood(config, (*ANY_MODEL, *own, *also))
    if odd:
        raise unknown_settings(odd, f"a plain {model_type}", where)


def refuse_unknown_around(whole: Mapping[str, object], own: Collection[str], expected: str, where: str) -> None:
    """Checks that the config around a language model has no setting that would be lost.

    Parameters
    ----------
    whole
        The config.
    own
        Keys that are understood, besides those that every model has.
    expected
        What was hoped for, for the message.
    where
        The file.

    Raises
    ------
    TargetError
        ``unsupported-architecture``.
    """
    odd = not_understood(whole, (*ANY_MODEL, *own))
    if odd:
        raise unknown_settings(odd, expected, where)


def not_understood(config: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    """Returns the settings that are not known and may change the arithmetic."""
    return {key: value for key, value in config.items() if key not in known and _counts(value)}


def unknown_settings(odd: Mapping[str, object], expected: str, where: str) -> TargetError:
    """Returns the error for settings that nothing here understands."""
    names = ", ".join(f"`{key}`" for key in odd)
    return TargetError(
        "unsupported-architecture",
        "the config has settings that the target does not support, and that would be lost",
        where=where,
        found=shown(dict(odd)),
        expected=expected,
        hint=f"if the code of the model ignores them, take {names} out of a copy of this file"[:400],
    )


def _counts(value: object) -> bool:
    """Whether a value may change the arithmetic: a number, a switch that is on, a table. A text is a name or a path."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list | dict):
        return bool(value)
    return not isinstance(value, str) and value not in _IDLE
