"""Tiny models of many families, by their own classes of transformers; few of an architecture that is known by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers

# Sizes of which no two are alike, so that a size read at a wrong place is seen.
TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
EYE: dict[str, Any] = {
    "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
SEQ: dict[str, Any] = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 40, "decoder_ffn_dim": 44, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
QFORMER = {**BERT, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "encoder_hidden_size": 20}
QWEN_EYE = {"depth": 2, "num_heads": 5, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
ROPE = {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 0]}}

# Class: model type and sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # decoders
    "GPT2LMHeadModel": ("gpt2", {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 6, "n_positions": 64}),
    "GPTNeoForCausalLM": (
        "gpt_neo",
        {"vocab_size": 50, "hidden_size": 24, "num_layers": 2, "num_heads": 6, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]]},
    ),
    "GPTNeoXForCausalLM": ("gpt_neox", BERT),
    "GPTJForCausalLM": ("gptj", {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 3, "rotary_dim": 4}),
    "GPTBigCodeForCausalLM": ("gpt_bigcode", {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 6}),
    "OPTForCausalLM": ("opt", {**BERT, "ffn_dim": 40, "word_embed_proj_dim": 12}),
    "BloomForCausalLM": ("bloom", {"vocab_size": 50, "hidden_size": 24, "n_layer": 3, "n_head": 6}),
    "MptForCausalLM": ("mpt", {"vocab_size": 50, "d_model": 24, "n_layers": 3, "n_heads": 6, "max_seq_len": 64}),
    "FalconForCausalLM": ("falcon", {**BERT, "new_decoder_architecture": True, "num_kv_heads": 3}),
    "CodeGenForCausalLM": ("codegen", {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}),
    "PhiForCausalLM": ("phi", TEXT),
    "Phi3ForCausalLM": ("phi3", TEXT),
    "GemmaForCausalLM": ("gemma", {**TEXT, "head_dim": 8}),
    "Gemma2ForCausalLM": ("gemma2", {**TEXT, "head_dim": 8}),
    "Gemma3ForCausalLM": ("gemma3_text", {**TEXT, "head_dim": 8}),
    "Qwen3ForCausalLM": ("qwen3", {**TEXT, "head_dim": 8, "tie_word_embeddings": True}),
    "Olmo2ForCausalLM": ("olmo2", TEXT),
    "GraniteForCausalLM": ("granite", TEXT),
    "CohereForCausalLM": ("cohere", TEXT),
    "Cohere2ForCausalLM": ("cohere2", TEXT),
    "Starcoder2ForCausalLM": ("starcoder2", TEXT),
    "StableLmForCausalLM": ("stablelm", TEXT),
    "NemotronForCausalLM": ("nemotron", TEXT),
    "GlmForCausalLM": ("glm", {**TEXT, "head_dim": 4}),
    "SmolLM3ForCausalLM": ("smollm3", TEXT),
    # experts
    "MixtralForCausalLM": ("mixtral", {**TEXT, "num_local_experts": 4}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {**TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 28}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**TEXT, **EXPERTS, "num_experts": 5}),
    "OlmoeForCausalLM": ("olmoe", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV3ForCausalLM": (
        "deepseek_v3",
        {**TEXT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 6,
         "q_lora_rank": 10, "kv_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
         "first_k_dense_replace": 1},
    ),
    "GptOssForCausalLM": ("gpt_oss", {**TEXT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # neither attention nor a decoder alone
    "MambaForCausalLM": ("mamba", {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "state_size": 4}),
    "RwkvForCausalLM": ("rwkv", {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3}),
    "JambaForCausalLM": (
        "jamba",
        {**TEXT, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "num_experts": 3, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "T5ForConditionalGeneration": (
        "t5",
        {"vocab_size": 50, "d_model": 24, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6,
         "d_kv": 4},
    ),
    "BartForConditionalGeneration": ("bart", SEQ),
    "MarianMTModel": ("marian", {**SEQ, "decoder_vocab_size": 50, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "MBartForConditionalGeneration": ("mbart", SEQ),
    # encoders
    "BertForMaskedLM": ("bert", BERT),
    "BertForSequenceClassification": ("bert", {**BERT, "num_labels": 4}),
    "RobertaForMaskedLM": ("roberta", BERT),
    "XLMRobertaForTokenClassification": ("xlm-roberta", {**BERT, "num_labels": 5}),
    "DebertaV2ForMaskedLM": ("deberta-v2", BERT),
    "DistilBertForMaskedLM": (
        "distilbert",
        {"vocab_size": 50, "dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 6, "max_position_embeddings": 64},
    ),
    "ElectraForPreTraining": ("electra", {**BERT, "embedding_size": 12}),
    "AlbertForMaskedLM": ("albert", {**BERT, "embedding_size": 12}),
    "ModernBertForMaskedLM": ("modernbert", BERT),
    # images
    "ViTForImageClassification": ("vit", EYE),
    "Dinov2Model": ("dinov2", EYE),
    "SiglipModel": ("siglip", {"text_config": BERT, "vision_config": EYE}),
    "SwinModel": ("swin", {"embed_dim": 12, "depths": [1, 2], "num_heads": [2, 4], "image_size": 32, "window_size": 2}),
    "SegformerForSemanticSegmentation": (
        "segformer",
        {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "num_encoder_blocks": 2,
         "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
         "decoder_hidden_size": 12},
    ),
    # images and text
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        {"text_config": {**TEXT, "head_dim": 8}, "vision_config": EYE, "mm_tokens_per_image": 4},
    ),
    "PaliGemmaForConditionalGeneration": (
        "paligemma",
        {"text_config": {"model_type": "gemma", **TEXT, "head_dim": 8}, "image_token_index": 9, "projection_dim": 24,
         "vision_config": {"model_type": "siglip_vision_model", **EYE, "projection_dim": 24}},
    ),
    "Qwen2VLForConditionalGeneration": (
        "qwen2_vl",
        {"text_config": {**TEXT, **ROPE}, **QWEN_IDS,
         "vision_config": {**QWEN_EYE, "embed_dim": 20, "hidden_size": 24}},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {"text_config": {**TEXT, **ROPE}, **QWEN_IDS,
         "vision_config": {**QWEN_EYE, "hidden_size": 20, "out_hidden_size": 24, "intermediate_size": 36}},
    ),
    "Idefics3ForConditionalGeneration": (
        "idefics3",
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": EYE, "image_token_id": 9, "scale_factor": 2},
    ),
    "SmolVLMForConditionalGeneration": (
        "smolvlm",
        {"text_config": {"model_type": "llama", **TEXT}, "vision_config": EYE, "image_token_id": 9, "scale_factor": 2},
    ),
    "Blip2ForConditionalGeneration": (
        "blip-2",
        {"text_config": {"model_type": "opt", **BERT, "ffn_dim": 40, "word_embed_proj_dim": 24}, "vision_config": EYE,
         "qformer_config": QFORMER, "num_query_tokens": 4, "image_token_index": 9},
    ),
    # speech
    "WhisperForConditionalGeneration": (
        "whisper",
        {**SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "begin_suppress_tokens": [4]},
    ),
    "Wav2Vec2ForCTC": (
        "wav2vec2",
        {**BERT, "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
}  # fmt: skip


def made(kind: str, **more: Any) -> torch.nn.Module:
    """Returns a tiny model of a class, every value drawn, its configs' own defaults where the table says nothing."""
    model_type, values = FAMILIES[kind]
    config = transformers.AutoConfig.for_model(model_type, **deepcopy(values), **more)
    torch.manual_seed(1)
    model: torch.nn.Module = getattr(transformers, kind)(config)
    return model


def complaints(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``output_loading_info`` has to say against a load."""
    found = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return {key: names for key, names in found.items() if names}


# Keys that say what tensors there are and of which sizes; not every class looks at each of its config's.
SIZES = frozenset((
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
    "depth", "vocab_size", "hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size",
    "intermediate_size", "num_key_value_heads", "num_local_experts", "num_experts", "n_routed_experts",
))  # fmt: skip


def raised(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a config with each size of the whole and of its parts raised by one, and which it is."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            yield from ((f"{key}.{inner}", {**config, key: part}) for inner, part in raised(value))
        elif key in SIZES and type(value) is int:
            yield key, {**config, key: value + 1}
