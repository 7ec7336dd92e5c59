"""The layouts that `shardmerge init` knows, as data: what their names and shapes look like, and the ways from there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownTensor:
    """A tensor that a layout has.

    Attributes
    ----------
    names
        Templates; a name of the checkpoint matches one of them.
    rank
        Its number of dimensions, a float tensor; None for any tensor.
    """

    names: tuple[str, ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Want:
    """A source that a preset can do without, and this checkpoint cannot.

    Attributes
    ----------
    role
        Its name in the preset.
    reason
        Why it is needed.
    unless
        A template: with such a tensor in the checkpoint it is not needed.
    unless_file
        Likewise a file beside the weights.
    """

    role: str
    reason: str
    unless: str = ""
    unless_file: str = ""


@dataclass(frozen=True, slots=True)
class Road:
    """A preset that leads away from a layout.

    Attributes
    ----------
    preset
        Its name.
    to
        What it makes, where the preset names no target.
    role
        Which of its sources the checkpoint is; empty for the first that it needs.
    """

    preset: str
    to: str = ""
    role: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout.

    Attributes
    ----------
    name
        For people.
    tensors
        All of them must be there.
    without
        Templates that no name may match.
    roads
        Presets from here.
    wants
        Sources that are needed besides those that the preset says.
    """

    name: str
    tensors: tuple[KnownTensor, ...]
    roads: tuple[Road, ...]
    without: tuple[str, ...] = ()
    wants: tuple[Want, ...] = ()


def _tensor(*names: str, rank: int | None = None) -> KnownTensor:
    return KnownTensor(names, rank)


def _dist(name: str) -> tuple[str, ...]:
    """Returns what a tensor of a layer is called: layers are stacked or numbered, and NeMo puts a word in front."""
    return tuple(
        f"{front}decoder.layers.{layer}{name}" for front in ("", "module.", "model.") for layer in ("", "{i:int}.")
    )


_LLM = Want("llm", "the LLM's config.json and tokenizer come from it, and every weight that was not trained")
_VISION = Want("vision", "the encoder's config.json comes from it, and every weight that was not trained")
_TOWER = Want("vision", "the checkpoint has no visual encoder", unless="model.vision_tower.{rest...}")
_LLAVA = (Road("llava/official-to-hf"), Road("llava/official-to-hf-next"))
_MEGATRON = Want("base", "Megatron keeps no config.json and no tokenizer")
_TO_HF = "model.layers.{i:int}.self_attn.q_proj.weight"

LAYOUTS = (
    Layout(
        "XTuner LLaVA",
        (_tensor("projector.model.{i:int}.weight", rank=2),),
        (Road("xtuner/llava-to-hf"), Road("xtuner/llava-to-official"), Road("xtuner/llava-to-xtuner")),
        wants=(_LLM, _VISION),
    ),
    Layout(
        "LLM or adapter of XTuner's LLaVA, LoRA",
        (_tensor("{part:llm|visual_encoder}.base_model.model.{rest...}.lora_A.default.weight", rank=2),),
        (Road("peft/export"),),
    ),
    Layout(
        "official LLaVA (LlavaLlamaForCausalLM)",
        (_tensor(_TO_HF, rank=2), _tensor("model.mm_projector.{rest...}")),
        _LLAVA[:1],
        without=("model.image_newline",),
        wants=(_TOWER,),
    ),
    Layout(
        "official LLaVA with an image_newline (LLaVA-NeXT, or 1.5 of later code)",
        (_tensor(_TO_HF, rank=2), _tensor("model.mm_projector.{rest...}"), _tensor("model.image_newline", rank=1)),
        _LLAVA,
        wants=(_TOWER,),
    ),
    Layout(
        "projector of an official LLaVA (mm_projector.bin, non_lora_trainables.bin)",
        (
            _tensor(
                "model.mm_projector.{rest...}",
                "base_model.model.model.mm_projector.{rest...}",
                "model.model.mm_projector.{rest...}",
            ),
        ),
        tuple(Road(road.preset, role="projector") for road in _LLAVA),
        without=(_TO_HF,),
        wants=(Want("vision", "a projector has no visual encoder"),),
    ),
    Layout(
        "Hugging Face LLaVA, legacy names (transformers 4.36 to 4.51, and what 4.52 to 4.57 save)",
        (
            _tensor("language_model.model.layers.{i:int}.self_attn.q_proj.weight", rank=2),
            _tensor("multi_modal_projector.linear_1.weight", rank=2),
            _tensor(
                "vision_tower.vision_model.encoder.layers.{i:int}.{rest...}",
                "vision_tower.encoder.layers.{i:int}.{rest...}",
            ),
        ),
        (Road("llava/hf-to-4.52"), Road("llava/hf-to-5.6"), Road("llava/hf-to-official")),
    ),
    Layout(
        "Hugging Face LLaVA, names of transformers 4.52 to 5.5",
        (
            _tensor("model.language_model.layers.{i:int}.self_attn.q_proj.weight", rank=2),
            _tensor("model.multi_modal_projector.linear_1.weight", rank=2),
            _tensor("model.vision_tower.vision_model.{rest...}"),
        ),
        (Road("llava/hf-to-legacy"), Road("llava/hf-to-5.6"), Road("llava/hf-to-official")),
    ),
    Layout(
        "Hugging Face LLaVA, names of transformers 5.6 and later",
        (
            _tensor("model.language_model.layers.{i:int}.self_attn.q_proj.weight", rank=2),
            _tensor("model.multi_modal_projector.linear_1.weight", rank=2),
            _tensor("model.vision_tower.encoder.layers.{i:int}.{rest...}"),
        ),
        (Road("llava/hf-to-legacy"), Road("llava/hf-to-4.52"), Road("llava/hf-to-official")),
    ),
    Layout(
        "Hugging Face LLaMA (Mistral, Qwen2)",
        (_tensor(_TO_HF, rank=2), _tensor("model.embed_tokens.weight", rank=2)),
        (
            Road("llama/hf-to-meta"),
            Road("llama/hf-to-torchtune", to="torchtune"),
            Road("llama/hf-to-litgpt", to="litgpt"),
            Road("llama/hf-to-hf"),
        ),
        without=("model.mm_projector.{rest...}", "{rest...}.lora_A.weight"),
    ),
    Layout(
        "Hugging Face Phi-3, fused",
        (
            _tensor("model.layers.{i:int}.self_attn.qkv_proj.weight", rank=2),
            _tensor("model.layers.{i:int}.mlp.gate_up_proj.weight", rank=2),
        ),
        (Road("llama/phi3-to-llama"), Road("llama/hf-to-torchtune-phi3", to="torchtune")),
    ),
    Layout(
        "Meta's LLaMA (consolidated.NN.pth)",
        (_tensor("{r:02}.layers.{i:int}.attention.wq.weight", rank=2), _tensor("{r:02}.tok_embeddings.weight", rank=2)),
        (Road("llama/meta-to-hf"),),
    ),
    Layout(
        "torchtune",
        (_tensor("layers.{i:int}.attn.q_proj.weight", rank=2), _tensor("tok_embeddings.weight", rank=2)),
        (Road("llama/torchtune-to-hf"), Road("llama/torchtune-phi3-to-hf")),
    ),
    Layout(
        "LoRA adapter of torchtune",
        (_tensor("layers.{i:int}.{part:attn|mlp}.{name}.lora_a.weight", rank=2),),
        (Road("llama/torchtune-lora-to-hf", role="adapter"),),
    ),
    Layout(
        "litgpt",
        (
            _tensor("transformer.h.{i:int}.attn.{kind:qkv|attn}.weight", rank=2),
            _tensor("transformer.wte.weight", rank=2),
        ),
        (Road("llama/litgpt-to-hf"),),
    ),
    Layout(
        "Megatron-Core",
        (_tensor("{t:int}.{p:int}.decoder.layers.{i:int}.self_attention.linear_qkv.weight", rank=2),),
        (Road("llama/megatron-to-hf"),),
        wants=(_MEGATRON,),
    ),
    Layout(
        "Megatron-Core's torch_dist",
        (_tensor(*_dist("self_attention.linear_qkv.weight")), _tensor(*_dist("mlp.linear_fc2.weight"))),
        (Road("llama/megatron-dist-to-hf"),),
        wants=(_MEGATRON,),
    ),
    Layout(
        "Megatron-Core's torch_dist of a Mixtral",
        (_tensor(*_dist("self_attention.linear_qkv.weight")), _tensor(*_dist("mlp.router.weight"))),
        (Road("llama/megatron-dist-to-hf"),),
        without=_dist("self_attention.q_layernorm.weight"),
        wants=(_MEGATRON,),
    ),
    Layout(
        "Megatron-Core's torch_dist of a Qwen3-MoE",
        (_tensor(*_dist("mlp.router.weight")), _tensor(*_dist("self_attention.q_layernorm.weight"))),
        (Road("llama/megatron-dist-to-hf-qwen3-moe"),),
        wants=(_MEGATRON,),
    ),
    Layout(
        "OpenAI's CLIP, open_clip",
        (
            _tensor(
                "visual.transformer.resblocks.{i:int}.attn.in_proj_weight",
                "module.visual.transformer.resblocks.{i:int}.attn.in_proj_weight",
                rank=2,
            ),
            _tensor("visual.conv1.weight", "module.visual.conv1.weight", rank=4),
        ),
        (Road("clip/open-clip-to-hf"),),
        wants=(Want("config", "there is no open_clip_config.json", unless_file="open_clip_config.json"),),
    ),
    Layout(
        "Hugging Face CLIP",
        (
            _tensor("vision_model.encoder.layers.{i:int}.self_attn.q_proj.weight", rank=2),
            _tensor("text_model.encoder.layers.{i:int}.self_attn.q_proj.weight", rank=2),
        ),
        (Road("clip/hf-to-open-clip", to="open_clip"), Road("clip/hf-to-vision")),
    ),
    Layout(
        "Hugging Face CLIP vision tower",
        (
            _tensor(
                "vision_model.encoder.layers.{i:int}.self_attn.q_proj.weight",
                "encoder.layers.{i:int}.self_attn.q_proj.weight",
                rank=2,
            ),
        ),
        (Road("clip/hf-to-vision"),),
        without=("text_model.{rest...}", "language_model.{rest...}"),
    ),
    Layout(
        "InternVL (InternVLChatModel)",
        (
            _tensor("vision_model.encoder.layers.{i:int}.attn.qkv.weight", rank=2),
            _tensor("mlp1.{i:int}.weight"),
            _tensor("language_model.{rest...}"),
        ),
        (Road("internvl/original-to-hf"),),
    ),
    Layout(
        "PEFT adapter",
        (
            _tensor(
                "base_model.model.{rest...}.lora_A.weight",
                "base_model.model.{rest...}.lora_A.default.weight",
                rank=2,
            ),
        ),
        (Road("llama/hf-to-hf", role="adapter"), Road("peft/export")),
    ),
)
