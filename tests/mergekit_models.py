"""Models for the examples of mergekit: as deep as the real ones, a few values wide, with weights that were drawn.

A model that was trained from another one lies beside it, by as much as its weights are large. Matrices have distinct
magnitudes as real ones do, and some that are equal: 16-bit numbers are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

_NARROW = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(layers: int, rows: int = 32) -> transformers.PreTrainedModel:
    """Returns a LLaMA."""
    config = transformers.LlamaConfig(**{**_NARROW, "vocab_size": rows}, num_hidden_layers=layers)
    return transformers.LlamaForCausalLM(config)


def mistral() -> transformers.PreTrainedModel:
    """Returns a Mistral of the 7B's depth."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_NARROW, num_hidden_layers=32))


def qwen2() -> transformers.PreTrainedModel:
    """Returns a Qwen2 of the 7B's depth."""
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_NARROW, num_hidden_layers=28))


def gpt2() -> transformers.PreTrainedModel:
    """Returns a GPT-2 of the small one's depth, its head tied."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=12, n_head=2)
    )


def qwen2_5_vl() -> transformers.PreTrainedModel:
    """Returns a Qwen2.5-VL whose encoder is deeper than its language model, as the 7B's is."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = {**_NARROW, "num_hidden_layers": 28, "rope_scaling": rope}
    vision = {"depth": 32, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "patch_size": 4})
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


_MISTRALS = (
    "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2", "BioMistral/BioMistral-7B",
    "NousResearch/Hermes-2-Pro-Mistral-7B", "teknium/OpenHermes-2.5-Mistral-7B",
)  # fmt: skip
_LLAMAS = (
    "TheBloke/Llama-2-13B-fp16", "psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B",
    "WizardLM/WizardLM-13B-V1.2", "WizardLM/WizardMath-13B-V1.0",
)  # fmt: skip
_QWENS = (
    "open-r1/Qwen2.5-Math-7B-RoPE-300k", "open-r1/R1-Distill-Qwen-Math-7B-v00.02",
    "open-r1/R1-Distill-Qwen-Math-7B-v01.02",
)  # fmt: skip
_VLMS = ("Qwen/Qwen2.5-VL-7B-Instruct", "impactframes/Qwen2.5-VL-7B-Captioner")
_WORDS = ("<unk>", "<s>", "</s>", *"abcdefghijklmnop")
_TOKENS: Mapping[str, tuple[str, ...]] = {
    "llama3_model": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml_model": ("<|im_start|>", "<|im_end|>"),
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
THINKING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<think>"


def write_models(folder: Path) -> None:
    """Writes every model of the examples under its own name, ``org/name``."""
    _family(folder, _MISTRALS, mistral(), torch.bfloat16)
    _family(folder, _LLAMAS, llama(40), torch.float16)
    _family(folder, _QWENS, qwen2(), torch.bfloat16)
    _family(folder, _VLMS, qwen2_5_vl(), torch.bfloat16)
    _family(folder, ("model_a", "model_b"), llama(4), torch.float32)
    _family(folder, ("gpt2",), gpt2(), torch.float32)
    for name, template in zip(_QWENS, (CHATML, THINKING, THINKING), strict=True):
        tokenizer(()).save_pretrained(folder / name)
        (folder / name / "chat_template.jinja").write_text(template, "utf-8")
    for name, added in _TOKENS.items():
        _family(folder, (name,), llama(4, len(_WORDS) + len(added)), torch.float32)
        tokenizer(added).save_pretrained(folder / name)


def tokenizer(added: tuple[str, ...]) -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of a few words, and special tokens behind them."""
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(_WORDS)}, unk_token="<unk>"))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.add_tokens(list(added), special_tokens=True)
    return made


def _family(folder: Path, names: tuple[str, ...], model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """Saves a model, and those that were trained from it."""
    torch.manual_seed(sum(map(ord, names[0])))
    drawn = {key: value + 0.05 * torch.randn_like(value) for key, value in model.state_dict().items()}
    model = model.to(dtype)
    for place, name in enumerate(names):
        moved = {key: value + 0.03 * torch.randn_like(value) * (place > 0) for key, value in drawn.items()}
        model.load_state_dict({key: value.to(dtype) for key, value in moved.items()})
        model.save_pretrained(folder / name)
