"""Layouts whose reference is a model of transformers: the source's names are written by hand-made tables that name
where they come from, the result is loaded by the library and computes what the model computes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.publish.verify import verify_load
from tests.conftest import GOLDEN
from tests.load_environments import VERSIONS, interpreter, ready
from tests.presets_in_use import compare_bits, read_tensors

transformers = pytest.importorskip("transformers")

HEADS, KV_HEADS, HEAD_DIM, LAYERS, FFN, VOCAB = 4, 2, 8, 4, 48, 100
HIDDEN = HEADS * HEAD_DIM
State = dict[str, torch.Tensor]


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor gets values of its own, norms and biases too, so that no two can be taken for each other."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.5 * (tensor.ndim == 1))
    return model.eval()


def loaded(kind: type, folder: Path) -> torch.nn.Module:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None] * 7 % VOCAB).logits


def llama(**changes: object) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **changes,
    )  # fmt: skip
    return scrambled(transformers.LlamaForCausalLM(config))


# ---- Phi-3


def test_a_split_phi3_is_a_llama_with_the_same_logits(tmp_path: Path) -> None:
    config = transformers.Phi3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, pad_token_id=0, sliding_window=None,
    )  # fmt: skip
    phi = scrambled(transformers.Phi3ForCausalLM(config))
    phi.save_pretrained(tmp_path / "phi")
    out = sm.convert(tmp_path / "phi", tmp_path / "out", use="llama/phi3-to-llama").path
    split = loaded(transformers.LlamaForCausalLM, out)
    assert torch.allclose(logits(split), logits(phi), atol=1e-5)


# ---- Megatron-Core


def megatron_rank(state: State, rank: int, ranks: int, stage: int, stages: int, *, engine: bool) -> dict[str, object]:
    """What one rank holds, by the rules of Megatron-LM's ``tools/checkpoint/saver_base.py`` and ``layers.py``:

    linear_qkv is [q of the group, k, v] for each key-value head and cut by rows, linear_fc1 is the rank's gate above
    its up projection, linear_proj and linear_fc2 are cut by columns, the vocabulary is padded and cut by rows.
    """
    found: dict[str, object] = {}
    padded = -(-VOCAB // (8 * ranks)) * 8 * ranks

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(ranks, 0)[rank].clone()

    def vocabulary(tensor: torch.Tensor) -> torch.Tensor:
        return rows(torch.cat([tensor, torch.full((padded - VOCAB, HIDDEN), 9.0)]))

    if stage == 0:
        found["embedding.word_embeddings.weight"] = vocabulary(state["model.embed_tokens.weight"])
    per_stage = LAYERS // stages
    for local in range(per_stage):
        source, at = f"model.layers.{stage * per_stage + local}", f"decoder.layers.{local}"
        q, k, v = (state[f"{source}.self_attn.{n}_proj.weight"] for n in "qkv")
        parts = zip(q.chunk(KV_HEADS), k.chunk(KV_HEADS), v.chunk(KV_HEADS), strict=True)
        found[f"{at}.self_attention.linear_qkv.weight"] = rows(torch.cat([torch.cat(group) for group in parts]))
        found[f"{at}.self_attention.linear_proj.weight"] = (
            state[f"{source}.self_attn.o_proj.weight"].chunk(ranks, 1)[rank].clone()
        )
        gate, up = (rows(state[f"{source}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        found[f"{at}.mlp.linear_fc1.weight"] = torch.cat([gate, up])
        found[f"{at}.mlp.linear_fc2.weight"] = state[f"{source}.mlp.down_proj.weight"].chunk(ranks, 1)[rank].clone()
        norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        names = norms if engine else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        found[f"{at}.{names[0]}"] = state[f"{source}.input_layernorm.weight"].clone()
        found[f"{at}.{names[1]}"] = state[f"{source}.post_attention_layernorm.weight"].clone()
        for n in "qk" if f"{source}.self_attn.q_norm.weight" in state else "":
            found[f"{at}.self_attention.{n}_layernorm.weight"] = state[f"{source}.self_attn.{n}_norm.weight"].clone()
        found[f"{at}.self_attention.core_attention._extra_state"] = None
    if stage == stages - 1:
        found["decoder.final_layernorm.weight"] = state["model.norm.weight"].clone()
        found["output_layer.weight"] = vocabulary(state["lm_head.weight"])
    return found


def write_megatron(folder: Path, state: State, ranks: int, stages: int, *, engine: bool) -> Path:
    arguments = argparse.Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=KV_HEADS,
        kv_channels=HEAD_DIM, ffn_hidden_size=FFN, tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=stages, group_query_attention=True, swiglu=True, rotary_base=10000,
        norm_epsilon=1e-6, padded_vocab_size=-(-VOCAB // (8 * ranks)) * 8 * ranks, normalization="RMSNorm",
        untie_embeddings_and_output_weights=True, max_position_embeddings=2048, add_bias_linear=False,
        qk_layernorm="model.layers.0.self_attn.q_norm.weight" in state,
    )  # fmt: skip
    for rank in range(ranks):
        for stage in range(stages):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            place = folder / "iter_0000010" / name
            place.mkdir(parents=True)
            part = megatron_rank(state, rank, ranks, stage, stages, engine=engine)
            torch.save({"args": arguments, "model": part, "iteration": 10}, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


@pytest.mark.parametrize(("ranks", "stages", "engine"), [(1, 1, True), (2, 1, True), (1, 2, False), (2, 4, True)])
def test_megatron(tmp_path: Path, ranks: int, stages: int, engine: bool) -> None:
    model = llama()
    model.config.save_pretrained(tmp_path / "base")
    source = write_megatron(tmp_path / "megatron", model.state_dict(), ranks, stages, engine=engine)
    bases = {"base": str(tmp_path / "base")}
    out = sm.convert(source, tmp_path / "out", use="llama/megatron-to-hf", bases=bases).path
    made = load_file(out / "model.safetensors")
    assert set(made) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(made[name], tensor), name
    assert torch.equal(logits(loaded(transformers.LlamaForCausalLM, out)), logits(model))


def test_megatron_of_a_qwen3(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=False,
    )  # fmt: skip
    model = scrambled(transformers.Qwen3ForCausalLM(config))
    model.config.save_pretrained(tmp_path / "base")
    source = write_megatron(tmp_path / "megatron", model.state_dict(), 2, 2, engine=True)
    bases = {"base": str(tmp_path / "base")}
    out = sm.convert(source, tmp_path / "out", use="llama/megatron-to-hf", bases=bases).path
    assert torch.equal(logits(loaded(transformers.Qwen3ForCausalLM, out)), logits(model))


def test_megatron_without_groups_says_one_group(tmp_path: Path) -> None:
    """Megatron's default, which means nothing without ``group_query_attention``."""
    golden = GOLDEN / "layouts" / "megatron_tp2_pp1_mha"
    source = shutil.copytree(golden / "source", tmp_path / "megatron")
    for path in source.rglob("model_optim_rng.pt"):
        saved = torch.load(path, weights_only=False)
        saved["args"].num_query_groups = 1
        torch.save(saved, path)
    bases = {"base": str(golden / "truth")}
    out = sm.convert(source, tmp_path / "out", use="llama/megatron-to-hf", bases=bases).path
    compare_bits(read_tensors(out), read_tensors(golden / "truth"))


def test_megatron_is_described_by_its_own_args(tmp_path: Path) -> None:
    """Without a base the padded vocabulary stays, since nothing says where it ends."""
    model = llama()
    source = write_megatron(tmp_path / "megatron", model.state_dict(), 2, 2, engine=True)
    out = sm.convert(source, tmp_path / "out", use="llama/megatron-to-hf").path
    found = loaded(transformers.LlamaForCausalLM, out)
    assert found.config.vocab_size == 112
    assert torch.allclose(logits(found)[..., :VOCAB], logits(model), atol=1e-5)


# ---- InternVL

# transformers' convert_internvl_weights_to_hf.py, read backwards.
INTERNVIT = (
    ("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
    ("vision_tower.embeddings.patch_embeddings.projection.", "vision_model.embeddings.patch_embedding."),
    ("vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
    (".attention.projection_layer.", ".attn.proj."),
    ("multi_modal_projector.layer_norm.", "mlp1.0."),
    ("multi_modal_projector.linear_1.", "mlp1.1."),
    ("multi_modal_projector.linear_2.", "mlp1.3."),
)
INTERNLM2 = (
    (".tok_embeddings.", ".embed_tokens."),
    ("language_model.output.", "language_model.lm_head."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)


def original_internvl(state: State, text: str) -> State:
    found: State = {}
    for name, tensor in state.items():
        plain = name
        for new, old in INTERNVIT:
            plain = plain.replace(new, old)
        found[plain] = tensor.clone().contiguous()
    for layer in range(2):
        at = f"vision_model.encoder.layers.{layer}"
        for p in ("weight", "bias"):
            parts = [found.pop(f"{at}.attention.{n}_proj.{p}", None) for n in "qkv"]
            if parts[0] is not None:
                found[f"{at}.attn.qkv.{p}"] = torch.cat(parts)
        if text == "internlm2":
            at = f"language_model.model.layers.{layer}"
            heads = [found.pop(f"{at}.self_attn.{n}_proj.weight").chunk(KV_HEADS) for n in "qkv"]
            groups = zip(*heads, strict=True)
            found[f"{at}.attention.wqkv.weight"] = torch.cat([torch.cat(group) for group in groups])
    if text == "internlm2":
        for old, new in INTERNLM2:
            found = {name.replace(new, old): tensor for name, tensor in found.items()}
    return found


@pytest.mark.parametrize("text", ["qwen2", "internlm2"])
def test_internvl(tmp_path: Path, text: str) -> None:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": False,
    }  # fmt: skip
    vit = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "num_channels": 3, "model_type": "intern_vit_6b",
    }  # fmt: skip
    architecture = {"qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM"}[text]
    whole = {
        "model_type": "internvl_chat", "downsample_ratio": 0.5, "select_layer": -1, "vision_config": vit,
        "llm_config": {**sizes, "model_type": text, "architectures": [architecture]},
        "template": "internvl2_5", "torch_dtype": "float32",
    }  # fmt: skip
    kind = "llama" if text == "internlm2" else text
    config = transformers.InternVLConfig(
        text_config=transformers.AutoConfig.for_model(kind, **sizes).to_dict(),
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [28, 28], "patch_size": [14, 14], "attention_bias": True, "norm_type": "layer_norm",
        },
        image_token_id=99, tie_word_embeddings=False,
    )  # fmt: skip
    model = scrambled(transformers.InternVLForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "original").mkdir()
    save_file(original_internvl(_hub_names(state), text), tmp_path / "original" / "model.safetensors")
    (tmp_path / "original" / "config.json").write_text(json.dumps(whole))
    text_of = (
        f"shardmerge: 1\nsources: {{internvl: {tmp_path / 'original'}}}\noutput: {tmp_path / 'out'}\n"
        "use: internvl/original-to-hf\ntarget: {name: hf/internvl, config: internvl, image_token_id: '99'}\n"
    )
    (tmp_path / "m.yaml").write_text(text_of)
    out = loaded(transformers.InternVLForConditionalGeneration, sm.run(tmp_path / "m.yaml").path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(out.state_dict()[name], tensor), name


def _hub_names(state: State) -> State:
    """The names of the hub's ``*-hf`` files, whichever transformers wrote these."""
    found = {}
    for name, tensor in state.items():
        plain = name.removeprefix("model.")
        if plain.startswith("language_model.") and not plain.startswith(
            ("language_model.model.", "language_model.lm_")
        ):
            plain = plain.replace("language_model.", "language_model.model.", 1)
        found["language_model.lm_head.weight" if plain == "lm_head.weight" else plain] = tensor
    return found


# ---- LLaVA's names in three generations of transformers, and its own

BASES = {"llm": str(GOLDEN / "xtuner" / "base_llm"), "vision": str(GOLDEN / "xtuner" / "base_clip")}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with the legacy names, every tensor trained."""
    entry = GOLDEN / "xtuner" / "single_trainvit" / "iter_2.pth"
    return sm.convert(entry, tmp_path_factory.mktemp("llava") / "hf", use="xtuner/llava-to-hf", bases=BASES).path


@pytest.mark.parametrize("names", ["4.52", "5.6"])
@pytest.mark.load
def test_names_of_a_generation_load_where_they_should_and_come_back(llava: Path, names: str, tmp_path: Path) -> None:
    there = sm.convert(llava, tmp_path / "there", use=f"hf/to-{names}").path
    for version in VERSIONS:
        loads = version.startswith("5.23") or (names == "4.52" and version.startswith("4.57"))
        if loads and ready(version):
            verify_load(there, str(interpreter(version)))
    back = sm.convert(there, tmp_path / "back", use="hf/to-4.51").path
    assert list(sm.diff(llava, back)) == []


# LLaVA's convert_llava_weights_to_hf.py (transformers), KEYS_TO_MODIFY_MAPPING in its anchored form.
OFFICIAL = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower.vision_tower."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
)


def test_official_names_there_and_back(llava: Path, tmp_path: Path) -> None:
    there = sm.convert(llava, tmp_path / "there", use="llava/hf-to-official").path
    made, expected = load_file(there / "model.safetensors"), load_file(llava / "model.safetensors")
    for name, tensor in expected.items():
        prefix, own = next(pair for pair in OFFICIAL if name.startswith(pair[0]))
        assert torch.equal(made.pop(own + name.removeprefix(prefix)), tensor), name
    assert made == {}
    back = sm.convert(there, tmp_path / "back", use="llava/official-to-hf", bases={"vision": BASES["vision"]}).path
    assert list(sm.diff(llava, back)) == []


def test_a_delay_loaded_tower_and_a_projector_of_its_own(llava: Path, tmp_path: Path) -> None:
    """LLaVA 1.5 as it is trained: a frozen tower that nobody saved, and mm_projector.bin of the first stage."""
    there = sm.convert(llava, tmp_path / "there", use="llava/hf-to-official").path
    tensors = load_file(there / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "vision_tower" not in n and "mm_projector" not in n}
    save_file(kept, there / "model.safetensors", metadata={"format": "pt"})
    projector = {n: torch.randn_like(t) for n, t in tensors.items() if "mm_projector" in n}
    torch.save(projector, tmp_path / "mm_projector.bin")
    bases = {"vision": BASES["vision"], "projector": str(tmp_path / "mm_projector.bin")}
    out = load_file(
        sm.convert(there, tmp_path / "out", use="llava/official-to-hf", bases=bases).path / "model.safetensors"
    )
    for number, index in (("1", "0"), ("2", "2")):
        for p in ("weight", "bias"):
            expected = projector[f"model.mm_projector.{index}.{p}"]
            assert torch.equal(out[f"multi_modal_projector.linear_{number}.{p}"], expected)
    base = torch.load(Path(BASES["vision"]) / "pytorch_model.bin", weights_only=True)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(out[f"vision_tower.{name}"].double(), base[name].double())


def test_llava_next_has_its_newline(tmp_path: Path, llava: Path) -> None:
    """An official LLaVA-NeXT loads as LlavaNextForConditionalGeneration, `image_newline` included."""
    there = sm.convert(llava, tmp_path / "there", use="llava/hf-to-official").path
    tensors = load_file(there / "model.safetensors")
    tensors["model.image_newline"] = torch.randn(12).bfloat16()
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((there / "config.json").read_text())
    config |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[28, 56], [56, 28]]}
    config |= {"image_aspect_ratio": "anyres"}
    (there / "config.json").write_text(json.dumps(config))
    bases = {"vision": BASES["vision"]}
    out = sm.convert(there, tmp_path / "out", use="llava/official-to-hf-next", bases=bases).path
    model = loaded(transformers.LlavaNextForConditionalGeneration, out)
    assert torch.equal(model.state_dict()["model.image_newline"].double(), tensors["model.image_newline"].double())
