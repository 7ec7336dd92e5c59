"""The mappings of the guides, run on small models made by transformers and peft, against what these tools compute."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge.cli.main import cli
from tests.conftest import GOLDEN
from tests.model_generations import build
from tests.test_docs import EXAMPLES
from tests.test_mergekit_configs import EXAMPLES as MERGED

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

State = dict[str, torch.Tensor]
MEGATRON = "torch_dist_llama_tp2_pp2"

# The examples that tests/test_docs.py, test_config_edits.py and test_mergekit_configs.py run.
ELSEWHERE = {
    "fewer-layers.yaml",
    "text-model.yaml",
    "rename.yaml",
    "two-sources.yaml",
    "zero-module-view.yaml",
    "xtuner-llava.yaml",
    "own-rules.yaml",
    "demo.yaml",
    *(f"merge-{name}.yaml" for name in (*MERGED, "della")),
}
HERE = {
    "adapter-any-model.yaml", "adapter-combined.yaml", "adapter-export.yaml",
    "adapter-extract.yaml", "adapter-own-base.yaml",
    "adapter-rename.yaml", "adapter-weights.yaml", "adapter-xtuner.yaml", "adapter.yaml",
    "adapters-two.yaml",
    "experts.yaml", "fused.yaml", "megatron-dist.yaml", "merge-dare.yaml", "merge-linear.yaml", "merge-slerp.yaml",
    "merge-tasks.yaml",
    "merge-ties.yaml", "meta-ranks.yaml", "meta.yaml", "older-transformers.yaml", "rest.yaml", "special-then-rest.yaml",
    "stages.yaml", "types.yaml", "vocabulary-tokens.yaml",
    "vocabulary.yaml",
}  # fmt: skip


def test_every_mapping_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == ELSEWHERE | HERE


def language_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(folder: Path, alpha: int, modules: list[str]) -> torch.nn.Module:
    """The base with an adapter that was trained: all of its numbers are random."""
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(alpha)
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=modules, init_lora_weights=False)
    return peft.get_peft_model(base, config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints that the guides name."""
    folder = tmp_path_factory.mktemp("guides")
    models, checkpoints = folder / "models", folder / "checkpoints"
    checkpoints.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        for seed, name in enumerate(("base", "chat", "code")):
            language_model(seed).save_pretrained(models / name)
        style = adapted(models / "base", 6, ["q_proj", "down_proj"])
        style.save_pretrained(models / "lora")
        facts = adapted(models / "base", 16, ["q_proj", "v_proj"])
        torch.save(peft.get_peft_model_state_dict(facts), checkpoints / "facts.pth")
    _fused(models / "fused")
    _stages(checkpoints)
    _omni(models / "omni", checkpoints / "thinker")
    _tokenizer(models)
    _in_memory(models / "qwen2-vl-5.x")
    shutil.copytree(GOLDEN / "layouts" / "meta_llama3_tp2_mha" / "source", checkpoints / "meta")
    shutil.copytree(GOLDEN / "layouts" / MEGATRON / "source", checkpoints / "megatron-dist")
    shutil.copytree(GOLDEN / "layouts" / MEGATRON / "truth", models / "megatron-base")
    xtuner = GOLDEN / "xtuner"
    shutil.copytree(xtuner / "lora_llm" / "work_dirs", folder / "work_dirs" / "lora")
    shutil.copytree(xtuner / "base_llm", models / "llm")
    shutil.copytree(xtuner / "base_clip", models / "clip")
    for path in EXAMPLES.glob("*.yaml"):
        shutil.copy(path, folder)
    return folder


def _fused(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16})
    )
    tensors = {f"layers.{i}.qkv.weight": torch.randn(32, 16) for i in range(2)}
    save_file(
        {**tensors, **{f"layers.{i}.down.kernel": torch.randn(24, 16) for i in range(2)}}, folder / "m.safetensors"
    )


def _omni(whole: Path, tuned: Path) -> None:
    for folder, prefix in ((whole, "thinker."), (tuned, "")):
        folder.mkdir()
        names = [f"{prefix}head.weight", f"{prefix}body.weight", *(["talker.weight"] if prefix else [])]
        save_file({name: torch.randn(2, 3) for name in names}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "omni"}')


def _in_memory(folder: Path) -> None:
    model = build("qwen2_vl")
    model.save_pretrained(folder)
    names = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(names, folder / "model.safetensors", metadata={"format": "pt"})


def _stages(folder: Path) -> None:
    for stage, own in enumerate(("embed.weight", "head.weight")):
        tensors = {f"layers.{i}.mlp.weight": torch.full((2, 2), float(10 * stage + i)) for i in range(2)}
        save_file({**tensors, own: torch.randn(4, 2)}, folder / f"stage{stage}.safetensors")
    experts = {f"layers.0.experts.{e}.up.weight": torch.full((3, 2), float(e)) for e in range(12)}
    save_file({**experts, "embed.weight": torch.randn(8, 2)}, folder / "experts.safetensors")


def _tokenizer(models: Path) -> None:
    shutil.copytree(models / "base", models / "with-tokenizer")
    for path in (GOLDEN / "xtuner" / "base_llm").glob("*token*"):
        shutil.copy(path, models / "with-tokenizer")
    config = json.loads((models / "with-tokenizer" / "config.json").read_text())
    tokens = len(transformers.AutoTokenizer.from_pretrained(models / "with-tokenizer"))
    model = language_model(0)
    model.resize_token_embeddings(tokens)
    model.save_pretrained(models / "with-tokenizer")
    assert config["vocab_size"] != tokens


def run(folder: Path, name: str) -> Path:
    """Runs a mapping of the guides; what an earlier one made at the same place goes."""
    prepared = shardmerge.plan(folder / name)
    assert prepared.tensor_bytes
    for old in ("merged",):
        shutil.rmtree(folder / "out" / old, ignore_errors=True)
    return shardmerge.run(folder / name, options=shardmerge.Options(sync=False)).path


def state(folder: Path) -> State:
    """The tensors of a directory of safetensors."""
    found: State = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def close(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], rtol: float = 1e-6) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor.float(), right[name].float(), rtol=rtol, atol=rtol)


# --- the mapping language ---


def test_fused(made: Path) -> None:
    before, after = state(made / "models" / "fused"), state(run(made, "fused.yaml"))
    for i in range(2):
        q, k, v = before[f"layers.{i}.qkv.weight"].split([16, 8, 8])
        assert torch.equal(after[f"layers.{i}.q.weight"], q)
        assert torch.equal(after[f"layers.{i}.k.weight"], k)
        assert torch.equal(after[f"layers.{i}.v.weight"], v)
        assert torch.equal(after[f"layers.{i}.down.weight"], before[f"layers.{i}.down.kernel"].T)


def test_special_then_rest(made: Path) -> None:
    before, tuned = state(made / "models" / "omni"), state(made / "checkpoints" / "thinker")
    after = state(run(made, "special-then-rest.yaml"))
    close(after, {**before, **{f"thinker.{name}": tensor for name, tensor in tuned.items()}}, rtol=0)


def test_rest(made: Path) -> None:
    before, after = state(made / "models" / "base"), state(run(made, "rest.yaml"))
    assert torch.equal(after.pop("head.weight"), before.pop("lm_head.weight"))
    close(after, before, rtol=0)


def test_stages(made: Path) -> None:
    after = state(run(made, "stages.yaml"))
    numbers = [after[f"layers.{i}.mlp.weight"][0, 0].item() for i in range(4)]
    assert numbers == [0, 1, 10, 11]
    assert len(after) == 6


def test_experts(made: Path) -> None:
    before, after = load_file(made / "checkpoints" / "experts.safetensors"), state(run(made, "experts.yaml"))
    assert after["layers.0.experts.up.weight"][:, 0, 0].tolist() == list(range(12))
    parts = before["embed.weight"].chunk(4)
    assert all(torch.equal(after[f"shard.{r:02}.embed.weight"], parts[r]) for r in range(4))


def test_types(made: Path) -> None:
    out = run(made, "types.yaml")
    after = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert after["model.norm.weight"].dtype == torch.float32
    assert after["model.layers.1.input_layernorm.weight"].dtype == torch.float32
    assert after["lm_head.weight"].dtype == torch.bfloat16


# --- adapters ---


def merged(made: Path, *also: tuple[str, int]) -> State:
    """What peft's merge_and_unload makes of models/lora, in float32."""
    base = transformers.LlamaForCausalLM.from_pretrained(made / "models" / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(base, made / "models" / "lora").merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_an_adapter(made: Path) -> None:
    truth = merged(made)
    close(state(run(made, "adapter-any-model.yaml")), truth)
    rounded = {name: tensor.bfloat16() for name, tensor in truth.items()}
    close(state(run(made, "adapter.yaml")), rounded, rtol=1e-2)


def test_half_of_an_adapter(made: Path) -> None:
    base = load_file(made / "models" / "base" / "model.safetensors")
    half = {name: (one + base[name]) / 2 for name, one in merged(made).items()}
    close(state(run(made, "adapter-weights.yaml")), half)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_adapter_between_two_models(made: Path) -> None:
    """A model that an adapter of rank 2 was merged into gives it back."""
    base = transformers.LlamaForCausalLM.from_pretrained(made / "models" / "base")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, config).merge_and_unload()
    tuned.save_pretrained(made / "models" / "tuned")
    adapter = run(made, "adapter-extract.yaml")
    fresh = transformers.LlamaForCausalLM.from_pretrained(made / "models" / "base")
    found = peft.PeftModel.from_pretrained(fresh, adapter).merge_and_unload().state_dict()
    truth = tuned.state_dict()
    assert max(float((found[name] - one).abs().max()) for name, one in truth.items()) < 1e-5


def test_an_adapter_by_other_names(made: Path) -> None:
    def called(name: str) -> str:
        return name.replace("model.", "backbone.", 1) if name.startswith("model.") else name

    (made / "models" / "renamed").mkdir()
    state_of_base = load_file(made / "models" / "base" / "model.safetensors")
    renamed = {called(name): tensor for name, tensor in state_of_base.items()}
    save_file(renamed, made / "models" / "renamed" / "model.safetensors")
    close(state(run(made, "adapter-rename.yaml")), {called(name): tensor for name, tensor in merged(made).items()})


def test_a_run_with_its_own_base(made: Path) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(language_model(3), config)
    (made / "work_dirs" / "run").mkdir(parents=True)
    whole = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    torch.save(whole, made / "work_dirs" / "run" / "pytorch_model.bin")
    close(state(run(made, "adapter-own-base.yaml")), dict(model.merge_and_unload().state_dict()))


def test_two_adapters(made: Path) -> None:
    truth = merged(made)
    facts = torch.load(made / "checkpoints" / "facts.pth", weights_only=True)
    for name, a in facts.items():
        if ".lora_A." in name:
            place = name.removeprefix("base_model.model.").replace(".lora_A", "")
            truth[place] += 16 / 4 * facts[name.replace("lora_A", "lora_B")] @ a
    close(state(run(made, "adapters-two.yaml")), truth)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_adapters_made_one(made: Path) -> None:
    base = transformers.LlamaForCausalLM.from_pretrained(made / "models" / "base")
    model = peft.PeftModel.from_pretrained(base, made / "models" / "lora", adapter_name="style")
    model.add_adapter("facts", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["up_proj"], init_lora_weights=False))
    model.save_pretrained(made / "models", selected_adapters=["facts"])
    model.add_weighted_adapter(["style", "facts"], [0.5, 1.0], "both", combination_type="cat")
    truth = peft.get_peft_model_state_dict(model, adapter_name="both")
    close(load_file(run(made, "adapter-combined.yaml") / "adapter_model.safetensors"), truth)


def test_a_run_of_xtuner(made: Path) -> None:
    plan = shardmerge.plan(made / "adapter-xtuner.yaml")
    assert any("merged from trained" in note for _, note in plan_notes(plan))
    out = run(made, "adapter-xtuner.yaml")
    truth = load_file(GOLDEN / "xtuner" / "lora_llm" / "truth.safetensors")
    base = state(GOLDEN / "xtuner" / "base_llm")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (truth[f"llm.base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
    case = transformers.LlamaConfig.from_pretrained(made / "models" / "llm")
    assert case.hidden_size == a.shape[1]
    found = state(out)[f"language_model.{name}.weight"].float()
    delta = (found - base[f"{name}.weight"].float()) - 2 * b.float() @ a.float()
    assert delta.abs().max() < 0.01


def plan_notes(plan: shardmerge.Plan) -> list[tuple[str, str]]:
    return [(source.name, note) for source in plan.sources for note in source.notes]


def test_an_exported_adapter_loads_in_peft(made: Path) -> None:
    config = peft.PeftConfig.from_pretrained(run(made, "adapter-export.yaml"))
    assert (config.r, config.lora_alpha) == (4, 8)
    assert config.base_model_name_or_path == "org/the-model-it-was-trained-on"


# --- merging ---


def models(made: Path) -> tuple[State, State, State]:
    base, chat, code = (state(made / "models" / name) for name in ("base", "chat", "code"))
    return base, chat, code


def test_linear(made: Path) -> None:
    _, chat, code = models(made)
    close(state(run(made, "merge-linear.yaml")), {n: 0.6 * chat[n] + 0.4 * code[n] for n in chat}, rtol=1e-2)


def test_slerp(made: Path) -> None:
    _, chat, code = models(made)
    truth = {}
    for name, a in chat.items():
        t, b = 0.3 if "self_attn" in name else 0.5, code[name]
        cosine = (a * b).sum() / a.norm() / b.norm()
        angle = torch.arccos(cosine.clamp(-1, 1))
        curved = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        truth[name] = (1 - t) * a + t * b if cosine.abs() > 0.9995 else curved
    close(state(run(made, "merge-slerp.yaml")), truth, rtol=1e-2)


def test_tasks(made: Path) -> None:
    base, chat, code = models(made)
    truth = {n: base[n] + 0.7 * (chat[n] - base[n]) + 0.5 * (code[n] - base[n]) for n in base}
    close(state(run(made, "merge-tasks.yaml")), truth, rtol=1e-2)


def test_ties(made: Path) -> None:
    base, chat, code = models(made)
    truth = {}
    for name in base:
        deltas = []
        for model in (chat, code):
            delta = (model[name] - base[name]).flatten()
            kept = delta.abs().topk(int(0.2 * delta.numel())).indices
            deltas.append(torch.zeros_like(delta).index_copy(0, kept, delta[kept]))
        both = torch.stack(deltas)
        agree = (both.sign() == both.sum(dim=0).sign()) & (both != 0)
        mean = (both * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
        truth[name] = base[name] + mean.reshape(base[name].shape)
    close(state(run(made, "merge-ties.yaml")), truth, rtol=1e-2)


def test_dare(made: Path) -> None:
    """Every element is one of the four that a coin for each model can make, of one sign."""
    base, chat, code = models(made)
    for name, found in state(run(made, "merge-dare.yaml")).items():
        a, b = (chat[name] - base[name]), (code[name] - base[name])
        choices = torch.stack([base[name], base[name] + a, base[name] + b, base[name] + a + b])
        assert ((found.float() - choices).abs().min(dim=0).values < 1e-3 + 0.01 * found.float().abs()).all(), name


# --- vocabularies and layouts ---


def test_a_larger_vocabulary(made: Path) -> None:
    old = state(made / "models" / "base")
    out = run(made, "vocabulary.yaml")
    new = transformers.LlamaForCausalLM.from_pretrained(out)
    assert new.config.vocab_size == 64
    embedding = new.model.embed_tokens.weight
    assert torch.equal(embedding[:40], old["model.embed_tokens.weight"])
    torch.testing.assert_close(embedding[63].detach(), old["model.embed_tokens.weight"].mean(dim=0))


def test_tokens(made: Path) -> None:
    before = transformers.AutoTokenizer.from_pretrained(made / "models" / "with-tokenizer")
    out = run(made, "vocabulary-tokens.yaml")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    ids = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<pad>"])
    assert ids == [len(before), len(before) + 1, len(before) + 2]
    assert tokenizer.pad_token == "<pad>"
    assert model.config.vocab_size == -(-len(tokenizer) // 8) * 8


def test_meta(made: Path) -> None:
    truth = load_file(GOLDEN / "layouts" / "meta_llama3_tp2_mha" / "truth" / "model.safetensors")
    after = state(run(made, "meta.yaml"))
    assert set(after) == set(truth)
    assert all(torch.equal(after[name], truth[name]) for name in truth)


def test_meta_ranks(made: Path) -> None:
    out = run(made, "meta-ranks.yaml")
    ranks = [torch.load(out / f"consolidated.{r:02}.pth", weights_only=True) for r in range(2)]
    whole = state(made / "models" / "base")
    assert torch.equal(torch.cat([rank["output.weight"] for rank in ranks]), whole["lm_head.weight"])


# --- another version of transformers ---


def test_a_model_of_another_version(made: Path) -> None:
    """What the installed version has in memory becomes what it saves itself, bit for bit, with a config of 4.51."""
    out = run(made, "older-transformers.yaml")
    wanted = build("qwen2_vl")
    wanted.save_pretrained(made / "qwen2-vl-saved")
    saved = load_file(made / "qwen2-vl-saved" / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert "visual.patch_embed.proj.weight" in found
    assert set(found) == set(saved)
    close(found, saved, rtol=0)
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["rope_theta"]) == (24, 5000.0)
    assert not {"text_config", "rope_parameters", "dtype"} & set(config)


def test_a_tensor_of_another_model_among_them(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "models" / "qwen2-vl-5.x", tmp_path / "models" / "qwen2-vl-5.x")
    path = tmp_path / "models" / "qwen2-vl-5.x" / "model.safetensors"
    save_file({**load_file(path), "value_head.weight": torch.ones(1)}, path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(shardmerge.ShardmergeError) as raised:
        shardmerge.convert(Path("models/qwen2-vl-5.x"), Path("out"), use="hf/to-4.51")
    page = (EXAMPLES.parent / "guides" / "generations.md").read_text("utf-8")
    error = raised.value
    assert f"error: {error.what} [{error.code}]" in page
    assert all(f"{text}\n" in page for text in (error.found, error.expected, error.hint))


# --- Megatron ---


def shown(page: str, start: str) -> list[str]:
    """A block of a page that begins with some text, cut where lines stand for others."""
    text = (EXAMPLES.parent / "guides" / page).read_text("utf-8")
    block = text.partition(f"```{start}")[2].partition("\n```")[0]
    parts = re.split(r"^\.\.\.$", block.partition("\n")[2], flags=re.MULTILINE)
    return [part.strip("\n") for part in parts if part.strip()]


# Pages that show the plan of a mapping.
PLANS = [
    ("adapters.md", "adapter.yaml"),
    ("layouts.md", "meta.yaml"),
    ("mapping-language.md", "fused.yaml"),
    ("megatron.md", "megatron-dist.yaml"),
    ("vocabulary.md", "vocabulary.yaml"),
    ("xtuner-llava.md", "adapter-xtuner.yaml"),
]


@pytest.mark.parametrize(("page", "mapping"), PLANS)
def test_plans_are_shown_as_they_are_printed(
    page: str, mapping: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    cli(["plan", mapping], standalone_mode=False)
    printed = capsys.readouterr().out
    parts = shown(page, f"console\n$ shardmerge plan {mapping}")
    assert sum(part.count("\n") for part in parts) >= 2
    assert all(part in printed for part in parts)


def test_megatron(made: Path) -> None:
    truth = load_file(GOLDEN / "layouts" / MEGATRON / "truth" / "model.safetensors")
    close(state(run(made, "megatron-dist.yaml")), truth, rtol=0)
    warning = "rows 50 to 63 of the vocabulary are Megatron's padding, and are cut off"
    assert f"warning: {warning}" in (EXAMPLES.parent / "guides" / "megatron.md").read_text("utf-8")
    assert warning in shardmerge.plan(made / "megatron-dist.yaml").warnings


def test_a_base_that_is_not_the_one_of_the_training(made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "models" / "megatron-base", base)
    config = json.loads((base / "config.json").read_text())
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0, "rope_parameters": rope}))
    source, preset = made / "checkpoints" / "megatron-dist", "llama/megatron-dist-to-hf"
    with pytest.raises(shardmerge.ShardmergeError) as raised:
        shardmerge.convert(source, tmp_path / "out", use=preset, bases={"base": str(base)})
    page = (EXAMPLES.parent / "guides" / "megatron.md").read_text("utf-8")
    (error,) = raised.value.each()
    assert f"{error.what} [{error.code}]" in page
    assert f"found: {error.found}\n" in page
    assert f"hint: {error.hint}\n" in page
