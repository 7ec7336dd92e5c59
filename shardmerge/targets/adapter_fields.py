"""What adapter_config.json may say, as tables: every field and tuner of peft 0.21, and what a merge makes of it.

Three answers: honoured; of no weight in a merge; refused, with the reason. The guide's table is made of these. A field
that is not listed may change the sums: set to anything but nothing, it is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping

# Read by ``adapter_config``, and how the sums follow them.
HONOURED: Mapping[str, str] = {
    "alpha": "LoHa and LoKr: as `lora_alpha`",
    "alpha_pattern": "expressions over module names, as in peft; the first that fits counts",
    "bias": "trained biases replace the base's",
    "ensure_weight_tying": "embedding and head stay one tensor",
    "exclude_modules": "what is not missed where it has no tensors",
    "fan_in_fan_out": "by layer, not by file: shapes, then the architecture, then this",
    "init_lora_weights": "see the initialisations below",
    "layer_replication": "the result has the replicated layers, config.json their number",
    "layers_pattern": "what is not missed where it has no tensors",
    "layers_to_transform": "the same",
    "lora_alpha": "the scale is lora_alpha / r",
    "lora_bias": "the bias of B, times the scale, is added to the base's",
    "modules_to_save": "replace the base's modules whole",
    "peft_type": "see the tuners below",
    "r": "compared with the tensors",
    "rank_pattern": "compared with the tensors",
    "target_modules": "all of their kind must have tensors",
    "target_parameters": "the product of each expert is added to its slice",
    "task_type": "a classifier's head",
    "trainable_token_indices": "rows of the embedding",
    "use_dora": "rows get their own length",
    "use_rslora": "the scale is lora_alpha / sqrt(r)",
}

# Of no weight in a merge, and why.
IRRELEVANT: Mapping[str, str] = {
    "auto_mapping": "which classes the run had",
    "peft_version": "who wrote the file",
    "transformers_version": "who wrote the file",
    "base_model_name_or_path": "the user names the base",
    "revision": "the same",
    "inference_mode": "whether anything is trained",
    "lora_dropout": "in training alone",
    "rank_dropout": "LoHa and LoKr: in training alone",
    "module_dropout": "the same",
    "rank_dropout_scale": "the same",
    "init_weights": "LoHa and LoKr: how the factors began, the base is left as it is",
    "use_effective_conv2d": "LoHa and LoKr: the tensors have the shapes that it asks for",
    "decompose_both": "LoKr: the same",
    "decompose_factor": "LoKr: the same",
    "merge_weights": "peft 0.1 and 0.2: whether its own eval() merges",
    "megatron_core": "a package, used with megatron_config alone",
    "qalora_group_size": "used with use_qalora alone",
    "loftq_config": "how A and B began: init_lora_weights tells",
    "eva_config": "the same; the ranks it chose stand in rank_pattern",
    "corda_config": "how A and B began: init_lora_weights tells",
    "lora_ga_config": "the same",
    "velora_config": "what the backward pass keeps",
    "runtime_config": "where DoRA's norms are computed",
    "lora_dtype": "ms-swift: the type in training",
    "lorap_lr_ratio": "ms-swift: a learning rate",
    "lorap_emb_lr": "the same",
}

# What is known to be no sum with a base, and why, for people.
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts after its invocation tokens alone, and merged always",
    "megatron_config": "megatron_config splits the layers over ranks, each file holding a part",
    "use_qalora": "QA-LoRA adds to the zero points of packed weights",
    "use_bdlora": "BD-LoRA stores A or B as the blocks of a diagonal",
    "arrow_config": "Arrow chooses between adapters token by token",
    "kasa_config": "KaSA cuts small singular values off the base before it adds",
    "monteclora_config": "MonteCLoRA samples around A with parameters of its own",
    "enable_lora": "enable_lora adapts parts of a fused layer",
}
# Of those above: what peft merges into numbers that answer as the adapter does.
MERGED_BY_PEFT = frozenset({"use_bdlora", "kasa_config", "monteclora_config"})

# ``init_lora_weights`` (``LoraLayer.update_layer``). What leaves the base as it is; true and nothing do so, too.
UNCHANGED: Mapping[str, str] = {
    "true": "A random, B zero",
    "gaussian": "the same",
    "eva": "A of the activations, B zero",
    "orthogonal": "B @ A is zero",
    "mica": "B of the base, A zero",
}
# What took something out of the base that is found in the base again.
TAKEN_OUT: Mapping[str, str] = {
    "pissa": "the base loses its r largest singular directions first, as in peft on loading",
    "olora": "the base loses scale times the first r columns of its Q times rows of its R first, as in peft on loading",
}
# What took something out of the base that no file says any more.
LOST: Mapping[str, str] = {
    "pissa_niter": "a randomized SVD, other in every run: peft itself makes another residual on loading",
    "corda": "CorDA's start follows from data of the run, which peft asks for again on loading",
    "loftq": "LoftQ's base is its own quantized one, other than any that is on disk",
    "lora_ga": "LoRA-GA's start follows from gradients of the run; peft adds to the untouched base on loading",
}

# ``peft_type``: what is merged here.
MERGED_TUNERS: Mapping[str, str] = {
    "LORA": "`scale * B @ A`, and what the fields above say",
    "LOHA": "`scale * (w1_a @ w1_b) * (w2_a @ w2_b)` by elements; convolutions flattened",
    "LOKR": "`scale * kron(w1, w2)`, each whole or a product; convolutions flattened",
}
_OTHER_SUM = "a sum with the base, of another kind"
_TURNS = "multiplies the base by a rotation"
_PROMPTS = "vectors before the input or inside attention: no weight of the base changes"
_ROUTES = "acts by the input: no one weight does the same"
# Those that peft merges: the way on is its own merge.
OTHER_TUNERS: Mapping[str, str] = {
    "ADALORA": "its scale is divided by a count of ranks that no file holds",
    "ADAMSS": _OTHER_SUM,
    "BEFT": "adds to the bias inside of the layer",
    "BOFT": _TURNS,
    "BONE": _OTHER_SUM,
    "C3A": "circular convolutions added to the base",
    "DEFT": "takes a subspace out of the base and adds to it",
    "DELORA": "a sum whose length follows the base's norms",
    "FOURIERFT": "a sum made of a few coefficients of its Fourier transform",
    "FROD": _OTHER_SUM,
    "GLORA": "multiplies the base and adds to it",
    "GRALORA": _OTHER_SUM,
    "HIRA": "multiplies the base by elements",
    "HRA": _TURNS,
    "IA3": "multiplies activations",
    "LN_TUNING": "norms that were trained whole, in layers of its own",
    "MISS": _OTHER_SUM,
    "OFT": _TURNS,
    "OSF": "changes singular directions of the base",
    "PEANUT": _OTHER_SUM,
    "PSOFT": _TURNS,
    "PVERA": "sums of matrices that are drawn anew from a seed",
    "RANDLORA": "the same",
    "ROAD": _TURNS,
    "SHIRA": "adds to single elements",
    "SUPERTUNING": "adds to single elements",
    "TINYLORA": _OTHER_SUM,
    "TRAINABLE_TOKENS": "rows of the embedding, in a layer of its own",
    "UNILORA": _OTHER_SUM,
    "VBLORA": "sums of vectors out of a common bank",
    "VERA": "sums of matrices that are drawn anew from a seed",
    "WAVEFT": "a sum made of a few coefficients of its wavelet transform",
}
# Those that no merge can do.
BESIDE_TUNERS: Mapping[str, str] = {
    "ADAPTION_PROMPT": _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "LILY": _ROUTES,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "POLY": _ROUTES,
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "SHADOW": _ROUTES,
    "XLORA": _ROUTES,
}

BY_PEFT = (
    "let peft merge it, and convert MERGED: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "
    "ADAPTER).merge_and_unload().save_pretrained(MERGED)"
)
BESIDE = (
    "no merge can do it: load it beside its base, "
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)"
)


def init_family(init: object) -> str:
    """Returns what an ``init_lora_weights`` is called in the tables: ``pissa_niter_16`` is ``pissa_niter``."""
    if init is None or isinstance(init, bool):
        return "true"
    text = str(init).lower()
    return "pissa_niter" if text.startswith("pissa_niter_") else text
