"""What adapter_config.json may say, as tables: every field and tuner of peft 0.21, and what a merge makes of it.

Three answers: honoured; of no weight in a merge; refused, with the reason. The guide's table is made of these. A field
that is not listed may change the sums: set to anything but nothing, it is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping

# Read by ``adapter_config``, and how the sums follow them.
HONOURED: Mapping[str, str] = {
    "alpha": "LoHa and LoKr: as `lora_alpha`",
    "alpha_pattern": "regular expressions over module names, as in peft; the first match applies",
    "bias": "trained biases replace the base's",
    "ensure_weight_tying": "embedding and head stay one tensor",
    "exclude_modules": "modules that may lack tensors",
    "fan_in_fan_out": "determined per layer: from shapes, then the architecture, then this field",
    "init_lora_weights": "see the initializations below",
    "layer_replication": "the result has the replicated layers, config.json their number",
    "layers_pattern": "layers that may lack tensors",
    "layers_to_transform": "the same",
    "lora_alpha": "the scale is lora_alpha / r",
    "lora_bias": "the bias of B, times the scale, is added to the base's",
    "modules_to_save": "these modules replace those of the base",
    "peft_type": "see the tuners below",
    "r": "compared with the tensors",
    "rank_pattern": "compared with the tensors",
    "target_modules": "all of these modules must have tensors",
    "target_parameters": "the product of each expert is added to its slice",
    "task_type": "a classifier's head",
    "trainable_token_indices": "rows of the embedding",
    "use_dora": "each row has its own magnitude",
    "use_rslora": "the scale is lora_alpha / sqrt(r)",
}

# Of no weight in a merge, and why.
IRRELEVANT: Mapping[str, str] = {
    "auto_mapping": "the classes of the run",
    "peft_version": "the writer of the file",
    "transformers_version": "the writer of the file",
    "base_model_name_or_path": "you name the base",
    "revision": "the same",
    "inference_mode": "whether the adapter is trained",
    "lora_dropout": "used only in training",
    "rank_dropout": "LoHa and LoKr: used only in training",
    "module_dropout": "the same",
    "rank_dropout_scale": "the same",
    "init_weights": "LoHa and LoKr: initial values of the factors; the base is unchanged",
    "use_effective_conv2d": "LoHa and LoKr: the shapes of the tensors show it",
    "decompose_both": "LoKr: the same",
    "decompose_factor": "LoKr: the same",
    "merge_weights": "peft 0.1 and 0.2: whether eval() merges",
    "megatron_core": "a package, used only with megatron_config",
    "qalora_group_size": "used only with use_qalora",
    "loftq_config": "initial values of A and B: see init_lora_weights",
    "eva_config": "the same; the ranks that it selected are in rank_pattern",
    "corda_config": "initial values of A and B: see init_lora_weights",
    "lora_ga_config": "the same",
    "velora_config": "what the backward pass stores",
    "runtime_config": "the device on which DoRA's norms are computed",
    "lora_dtype": "ms-swift: the type in training",
    "lorap_lr_ratio": "ms-swift: a learning rate",
    "lorap_emb_lr": "the same",
}

# What is known to be no sum with a base, and why, for people.
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts only after its invocation tokens; if merged, always",
    "megatron_config": "megatron_config splits the layers over ranks, and each file contains a part",
    "use_qalora": "QA-LoRA adds to the zero points of packed weights",
    "use_bdlora": "BD-LoRA stores A or B as the blocks of a diagonal",
    "arrow_config": "Arrow selects an adapter for each token",
    "kasa_config": "KaSA removes small singular values from the base before it adds",
    "monteclora_config": "MonteCLoRA samples around A with its own parameters",
    "enable_lora": "enable_lora adapts parts of a fused layer",
}
# Of those above: what peft merges into numbers that answer as the adapter does.
MERGED_BY_PEFT = frozenset({"use_bdlora", "kasa_config", "monteclora_config"})

# ``init_lora_weights`` (``LoraLayer.update_layer``). What leaves the base as it is; true and nothing do so, too.
UNCHANGED: Mapping[str, str] = {
    "true": "A random, B zero",
    "gaussian": "the same",
    "eva": "A from activations, B zero",
    "orthogonal": "B @ A is zero",
    "mica": "B from the base, A zero",
}
# What took something out of the base that is found in the base again.
TAKEN_OUT: Mapping[str, str] = {
    "pissa": "the r largest singular directions are subtracted from the base first, as in peft on loading",
    "olora": "scale times Q[:, :r] @ R[:r] is subtracted from the base first, as in peft on loading",
}
# What took something out of the base that no file says any more.
LOST: Mapping[str, str] = {
    "pissa_niter": "a randomized SVD, different in every run: peft itself computes a different residual on loading",
    "corda": "CorDA's initialization depends on data of the run, which peft requires again on loading",
    "loftq": "LoftQ's base is its own quantized model, which is not saved",
    "lora_ga": "LoRA-GA's initialization depends on gradients of the run; peft adds to the unchanged base on loading",
}

# ``peft_type``: what is merged here.
MERGED_TUNERS: Mapping[str, str] = {
    "LORA": "`scale * B @ A`, with the fields above",
    "LOHA": "`scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, elementwise; convolutions flattened",
    "LOKR": "`scale * kron(w1, w2)`, each a full matrix or a product; convolutions flattened",
}
_OTHER_SUM = "adds to the base by another formula"
_TURNS = "multiplies the base by a rotation"
_PROMPTS = "vectors before the input or inside attention: no weight of the base changes"
_ROUTES = "depends on the input: no single weight is equivalent"
# Those that peft merges: the way on is its own merge.
OTHER_TUNERS: Mapping[str, str] = {
    "ADALORA": "its scale is divided by a number of ranks that is not saved",
    "ADAMSS": _OTHER_SUM,
    "BEFT": "adds to the bias inside the layer",
    "BOFT": _TURNS,
    "BONE": _OTHER_SUM,
    "C3A": "circular convolutions added to the base",
    "DEFT": "removes a subspace from the base and adds to it",
    "DELORA": "a sum whose norm depends on the base's norms",
    "FOURIERFT": "a sum computed from a few Fourier coefficients",
    "FROD": _OTHER_SUM,
    "GLORA": "multiplies the base and adds to it",
    "GRALORA": _OTHER_SUM,
    "HIRA": "multiplies the base elementwise",
    "HRA": _TURNS,
    "IA3": "multiplies activations",
    "LN_TUNING": "trained norms, in its own layers",
    "MISS": _OTHER_SUM,
    "OFT": _TURNS,
    "OSF": "changes singular directions of the base",
    "PEANUT": _OTHER_SUM,
    "PSOFT": _TURNS,
    "PVERA": "sums of random matrices, regenerated from a seed",
    "RANDLORA": "the same",
    "ROAD": _TURNS,
    "SHIRA": "adds to single elements",
    "SUPERTUNING": "adds to single elements",
    "TINYLORA": _OTHER_SUM,
    "TRAINABLE_TOKENS": "rows of the embedding, in its own layer",
    "UNILORA": _OTHER_SUM,
    "VBLORA": "sums of vectors from a shared bank",
    "VERA": "sums of random matrices, regenerated from a seed",
    "WAVEFT": "a sum computed from a few wavelet coefficients",
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
