"""Makes mergekit/: three tiny models, configs, and what mergekit 0.1.5 makes of them.

    python make_mergekit.py --out DIR

needs torch 2.13.0, transformers 5.24.0 and `pip install --no-deps mergekit==0.1.5 immutables`. The models are LLaMAs of four
layers with a few hundred random weights each, `models/base`, `models/chat`, `models/code`. A config of several documents is run
as `mergekit-multi` does. `results.safetensors` holds `CONFIG/TENSOR`, `configs.json` what config.json says of a result.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import multimerge
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS = 4
TASKS = "base_model: models/base\ndtype: float32\n"
PAIR = "models: [{model: models/chat}, {model: models/code}]\n"
WEIGHTED = """\
models:
  - {model: models/chat, parameters: {weight: 0.3, density: 0.6}}
  - {model: models/code, parameters: {weight: 0.9, density: 0.4}}
"""
FILTERED = """\
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
"""
CONFIGS = {
    "linear": "models:\n  - {model: models/base, parameters: {weight: 1.0}}\n"
    "  - {model: models/chat, parameters: {weight: 0.3}}\n  - {model: models/code, parameters: {weight: [0.5, 1.5]}}\n"
    "merge_method: linear\ndtype: float32\nout_dtype: bfloat16\n",
    "linear-plain": "models:\n  - {model: models/chat, parameters: {weight: 0.25}}\n"
    "  - {model: models/code, parameters: {weight: 0.5}}\nmerge_method: linear\nparameters: {normalize: false}\n",
    "slerp-gradient": "slices:\n  - sources:\n      - {model: models/chat, layer_range: [0, 4]}\n"
    "      - {model: models/code, layer_range: [0, 4]}\nmerge_method: slerp\nbase_model: models/chat\n"
    f"{FILTERED}dtype: float32\n",
    "slerp-models": f"models: [{{model: models/code}}]\nmerge_method: slerp\nbase_model: models/chat\n{FILTERED}"
    "dtype: bfloat16\n",
    "task_arithmetic": f"{WEIGHTED}merge_method: task_arithmetic\nparameters: {{normalize: true, lambda: 0.7}}\n{TASKS}",
    "ties-gradient": """\
models:
  - model: models/chat
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: models/code
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0.1
merge_method: ties
parameters: {normalize: true, int8_mask: true}
"""
    + TASKS,
    "ties-base-named": """\
models:
  - model: models/base
  - model: models/chat
    parameters: {density: 0.5, weight: 0.5}
  - model: models/code
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
parameters: {normalize: false, rescale: true}
"""
    + TASKS,
    "breadcrumbs": f"{WEIGHTED}merge_method: breadcrumbs\nparameters: {{gamma: [0.01, 0.2]}}\n{TASKS}",
    "breadcrumbs_ties": f"{WEIGHTED}merge_method: breadcrumbs_ties\n{TASKS}",
    "dare_linear": f"{PAIR}merge_method: dare_linear\nparameters: {{weight: 0.5}}\n{TASKS}",
    "dare_ties": f"{PAIR}merge_method: dare_ties\nparameters: {{weight: 0.5, density: 1.0}}\n{TASKS}",
    "della": f"{PAIR}merge_method: della\nparameters: {{weight: 0.5, density: 1.0, epsilon: 0.1}}\n{TASKS}",
    "della_linear": f"{PAIR}merge_method: della_linear\nparameters: {{weight: 0.5}}\n{TASKS}",
    "nuslerp": f"{WEIGHTED}merge_method: nuslerp\ndtype: float32\n",
    "nuslerp-base": f"{WEIGHTED}merge_method: nuslerp\nparameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}\n{TASKS}",
    "multislerp": f"{WEIGHTED}merge_method: multislerp\n{TASKS}",
    "karcher": f"{PAIR}merge_method: karcher\nparameters: {{max_iter: 5}}\n{TASKS}",
    "model_stock": f"{PAIR}merge_method: model_stock\n{TASKS}",
    "nearswap": "models: [{model: models/chat}]\nmerge_method: nearswap\nparameters: {t: [0.001, 0.01]}\n" + TASKS,
    "arcee_fusion": "models: [{model: models/base}, {model: models/chat}]\nmerge_method: arcee_fusion\n" + TASKS,
    "sce": f"{PAIR}merge_method: sce\nparameters: {{select_topk: 0.6}}\n{TASKS}",
    "ram": f"{PAIR}merge_method: ram\nparameters: {{epsilon: 0.005}}\n{TASKS}",
    "ramplus_tl": f"{PAIR}merge_method: ramplus_tl\nparameters: {{epsilon: 0.005, alpha: 0.5}}\n{TASKS}",
    "layers": "slices:\n  - sources: [{model: models/chat, layer_range: [0, 3]}]\n"
    "  - sources: [{model: models/code, layer_range: [1, 4]}]\nmerge_method: passthrough\ndtype: bfloat16\n",
    "layers-scaled": """\
slices:
  - sources: [{model: models/chat, layer_range: [0, 2]}]
  - sources:
      - model: models/chat
        layer_range: [1, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: [0.0, 0.5]}
            - value: 1.0
merge_method: passthrough
dtype: float32
""",
    "layers-mixed": """\
slices:
  - sources:
      - {model: models/chat, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
      - {model: models/code, layer_range: [2, 4], parameters: {weight: 0.5}}
  - sources:
      - {model: models/code, layer_range: [1, 4], parameters: {weight: 1.0}}
      - {model: models/base, layer_range: [0, 3], parameters: {weight: [{filter: mlp, value: 0.25}, {value: 1.0}]}}
merge_method: linear
dtype: float32
""",
    "chain": f"""\
slices:
  - sources:
      - {{model: models/chat, layer_range: [0, 4]}}
      - {{model: models/code, layer_range: [0, 4]}}
merge_method: slerp
base_model: models/chat
{FILTERED}dtype: float16
name: middle
---
models:
  - model: middle
    parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}
  - model: models/code
    parameters:
      density: 0.33
      weight: [{{filter: mlp, value: 0.5}}, {{value: 0}}]
merge_method: ties
base_model: models/base
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
""",
}


WORDS = {
    "base": ["<unk>", "<s>", "</s>", *"abcdefghij"],
    "chat": ["<unk>", "<s>", "</s>", *"abcdefghij", "<|user|>", "<|both|>"],
    "code": ["<unk>", "<s>", "</s>", *"abcdefghij", "<|both|>", "<|code|>", "<|tab|>"],
}
# Rows of the embeddings: the base and code have more than tokens.
ROWS = {"base": 16, "chat": 15, "code": 20}
TOKENS = """\
models:
  - {model: tokens/chat, parameters: {weight: 0.25}}
  - {model: tokens/code, parameters: {weight: 0.75}}
"""
TOKEN_CONFIGS = {
    "union": f"{TOKENS}merge_method: linear\nbase_model: tokens/base\nparameters: {{weight: 1.0}}\ntokenizer_source: union\ndtype: float32\n",
    "union-ties": f"{TOKENS}merge_method: ties\nbase_model: tokens/base\ntokenizer: {{source: union}}\ndtype: float32\n",
    "base-tokens": f"{TOKENS}merge_method: multislerp\nbase_model: tokens/base\ntokenizer_source: base\ndtype: float32\n",
    "chosen": f"""{TOKENS}merge_method: linear
parameters: {{weight: 1.0}}
base_model: tokens/base
tokenizer:
  source: union
  tokens:
    <|both|>: {{source: tokens/code}}
    <|user|>: {{source: {{kind: model_token, model: tokens/base, token: a}}, force: true}}
    <|new|>: {{source: {{kind: zero}}}}
dtype: float32
""",
}


def write_token_models(folder: Path) -> None:
    """Writes models with tokenizers: that of the base, and two that have more tokens, at other places."""
    for seed, (name, words) in enumerate(WORDS.items()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config_of(ROWS[name]))
        model.load_state_dict({key: 0.1 * torch.randn_like(value) for key, value in model.state_dict().items()})
        model.save_pretrained(folder / name)
        inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words) if place < 13}, unk_token="<unk>"))
        made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        made.add_tokens(words[13:])
        made.save_pretrained(folder / name)


def config_of(vocab_size: int) -> LlamaConfig:
    """Returns the config of a tiny model."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=12, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip


def write_models(folder: Path) -> None:
    """Writes the models: two that were trained from the base, by as much as its weights are large."""
    config = config_of(24)
    torch.manual_seed(5)
    base = LlamaForCausalLM(config)
    drawn = {name: value + 0.05 * torch.randn_like(value) for name, value in base.state_dict().items()}
    for name in ("base", "chat", "code"):
        moved = {key: value + 0.03 * torch.randn_like(value) * (name != "base") for key, value in drawn.items()}
        base.load_state_dict(moved)
        base.save_pretrained(folder / name)


def merge(text: str, out: Path) -> None:
    """Runs a config, or several documents one after the other."""
    options = MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True)
    if "---" not in text:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
        return
    between = out.with_name(out.name + "-between")
    configs, needs = multimerge.load_config(text, str(between))
    tasks = multimerge.make_tasks(configs, needs, options, str(between), str(out), False)
    multimerge.Executor(tasks, math_device="cpu", storage_device="cpu").execute(desc="")


def main() -> None:
    """Writes models, configs and results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    write_models(out / "models")
    write_token_models(out / "tokens")
    results, said = {}, {}
    os.chdir(out)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (CONFIGS | TOKEN_CONFIGS).items():
            (out / f"{name}.yml").write_text(text, "utf-8")
            made = Path(folder, name)
            merge(text, made)
            tensors = load_file(
                made / "model.safetensors"
                if (made / "model.safetensors").is_file()
                else next(made.glob("*.safetensors"))
            )
            results |= {f"{name}/{key}": value for key, value in tensors.items()}
            config = json.loads((made / "config.json").read_text("utf-8"))
            words = AutoTokenizer.from_pretrained(made).get_vocab() if name in TOKEN_CONFIGS else {}
            said[name] = {"tokens": words} if words else {}
            said[name] |= {key: config[key] for key in ("num_hidden_layers", "vocab_size", "dtype")}
    save_file(results, out / "results.safetensors", {"mergekit": "0.1.5"})
    (out / "configs.json").write_text(json.dumps(said, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
