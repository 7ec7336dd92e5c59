"""Quantized weights are known by what they are: codes are copied with their scales, dequantized, or refused by name.

Files of other libraries lie in tests/golden/quantized (``make_quantized.py``); where no library runs on a CPU, names,
types and shapes are those of the sources that shardmerge/tensors/packed.py names.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

import shardmerge as sm
from shardmerge.tensors.packed import fp8_weights, packed_weights
from tests.conftest import GOLDEN, shardmerge

Tensor = torch.Tensor
State = dict[str, Tensor]
QUANTIZED = GOLDEN / "quantized"
FP8 = torch.float8_e4m3fn
STATED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64], "modules_to_not_convert": ["lm_head"]}


def options(dtype: str | None = None) -> sm.Options:
    return sm.Options(sync=False, dtype=dtype)


def write(folder: Path, state: State, config: dict | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict:
    found: dict = json.loads((folder / "config.json").read_text())
    return found


def same(left: State, right: State) -> bool:
    def equal(a: Tensor, b: Tensor) -> bool:
        raw = (each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)

    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


def mapping(folder: Path, text: str) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(f"shardmerge: 1\n{text}")
    return path


def code(call: Callable[[], object]) -> str:
    """Returns the one error's code and text."""
    with pytest.raises(sm.ShardmergeError) as caught:
        call()
    return str(caught.value)


# ---- a model of float8 weights by blocks, as DeepSeek and Qwen publish them


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(shape).bfloat16().eval()


def quantized(state: State) -> State:
    """Codes and scales of every linear layer but the head, in blocks of 64."""
    found = {}
    for name, weight in state.items():
        if "_proj" not in name:
            found[name] = weight
            continue
        tiles = weight.float().unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).reshape(weight.shape).to(FP8)
        found |= {name: codes, f"{name}_scale_inv": scale, name.replace("weight", "input_scale"): torch.ones(1)}
    return found


@pytest.fixture(scope="module")
def fp8(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "fp8"
    llama.save_pretrained(folder)
    return write(folder, quantized(tensors(folder)), config(folder) | {"quantization_config": STATED})


@pytest.fixture(scope="module")
def numbers(fp8: Path) -> State:
    """What transformers makes of it where the user asks it to dequantize."""
    said = FineGrainedFP8Config(weight_block_size=(64, 64), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=said, dtype=torch.bfloat16)
    return dict(model.state_dict())


def test_a_cast_is_what_transformers_loads(fp8: Path, numbers: State, tmp_path: Path) -> None:
    result = sm.convert(fp8, tmp_path / "out", options=options("bfloat16"))
    assert same(tensors(tmp_path / "out"), numbers)
    assert config(tmp_path / "out") == {k: v for k, v in config(fp8).items() if k != "quantization_config"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert same(dict(loaded.state_dict()), numbers)
    assert "14 float8 weights dequantized" in result.plan.warnings[0]
    dropped = {one.name for one in result.plan.unused}
    assert dropped == {name for name in tensors(fp8) if name.endswith("input_scale")}
    assert "input_scale" not in "".join(tensors(tmp_path / "out"))
    sm.verify(tmp_path / "out")


def test_a_cast_to_float32_is_not_rounded_on_the_way(fp8: Path, tmp_path: Path) -> None:
    sm.convert(fp8, tmp_path / "out", options=options("float32"))
    state, found = tensors(fp8), tensors(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    scale = state[f"{name}_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(found[name], state[name].float() * scale)
    assert config(tmp_path / "out")["dtype"] == "float32"


@pytest.mark.parametrize("text", ["", "target: {name: hf/model, text: src}\n"])
def test_a_copy_is_a_copy(fp8: Path, tmp_path: Path, text: str) -> None:
    sm.convert(fp8, tmp_path / "plain", options=options())
    rules = 'tensors:\n  "{rest...}": "src:{rest...}"\n'
    path = mapping(tmp_path, f"sources: {{src: {fp8}}}\noutput: {{path: out}}\n{text}{rules}")
    sm.run(path, options=options())
    assert same(tensors(tmp_path / "plain"), tensors(fp8))
    assert same(tensors(tmp_path / "out"), tensors(fp8))
    for folder in (tmp_path / "plain", tmp_path / "out") if text else (tmp_path / "plain",):
        assert config(folder) == config(fp8)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_an_adapter_is_added_to_numbers(
    fp8: Path, numbers: State, llama: LlamaForCausalLM, tmp_path: Path, dtype: str | None
) -> None:
    torch.manual_seed(1)
    base = LlamaForCausalLM(llama.config)
    base.load_state_dict(wide(fp8))
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        adapted = get_peft_model(base, settings)
        adapted.save_pretrained(tmp_path / "lora")
        merged = adapted.merge_and_unload().state_dict()
    result = sm.convert(tmp_path / "lora", tmp_path / "out", bases={"base": str(fp8)}, options=options(dtype))
    found = tensors(tmp_path / "out")
    assert found.keys() == merged.keys() == numbers.keys()
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if dtype else torch.bfloat16)
        torch.testing.assert_close(tensor, merged[name].to(tensor.dtype), rtol=2e-7 if dtype else 0.008, atol=1e-6)
    assert "quantization_config" not in config(tmp_path / "out")
    assert any("14 float8 weights dequantized" in text for text in result.plan.warnings)


def wide(folder: Path) -> State:
    """The numbers of a model of blocks of 64 in float32."""
    state = tensors(folder)
    found = {}
    for name, tensor in state.items():
        if tensor.dtype == FP8:
            scale = state[f"{name}_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
            found[name] = tensor.float() * scale
        elif not name.endswith(("scale", "scale_inv")):
            found[name] = tensor.float()
    return found


def test_a_merge_of_two_models_of_which_one_is_quantized(fp8: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "other")
    rules = 'tensors:\n  "{rest...}": {op: linear, of: ["a:{rest...}", "b:{rest...}"]}\n'
    text = f"sources: {{a: {fp8}, b: other}}\noutput: {{path: out, dtype: float32}}\n{rules}"
    for target in ("", "target: {name: hf/model, text: a}\n"):
        sm.run(mapping(tmp_path, text + target), tmp_path / f"out{len(target)}", options=options())
        found, left, right = tensors(tmp_path / f"out{len(target)}"), wide(fp8), tensors(tmp_path / "other")
        assert found.keys() == right.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (left[name] + right[name].float()) / 2, rtol=3e-7, atol=1e-8)
    assert "quantization_config" not in config(tmp_path / f"out{len(target)}")


@pytest.mark.parametrize(
    ("target", "rows"),
    [("hf/llama", ""), ("hf/llama", "vocabulary: {rows: 40}\n"), ("hf/model", "vocabulary: {rows: 40}\n")],
)
def test_a_target_that_takes_numbers(fp8: Path, numbers: State, tmp_path: Path, target: str, rows: str) -> None:
    text = f"sources: {{base: {fp8}}}\noutput: {{path: out}}\ntarget: {{name: {target}, text: base}}\n{rows}"
    sm.run(mapping(tmp_path, text + 'tensors:\n  "{rest...}": "base:{rest...}"\n'), options=options())
    found = tensors(tmp_path / "out")
    assert same(
        {k: v[:32] if k in ("lm_head.weight", "model.embed_tokens.weight") else v for k, v in found.items()}, numbers
    )
    assert "quantization_config" not in config(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert same(dict(loaded.state_dict()), found)


def test_layers_of_a_quantized_model_beside_those_of_another(
    fp8: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    """One config.json speaks of all of them, so all are numbers."""
    llama.save_pretrained(tmp_path / "b")
    target = "target: {name: hf/model, text: a}\n"
    rules = 'tensors:\n  "model.layers.0.{rest...}": "a:model.layers.0.{rest...}"\n'
    for name in ("model.layers.1.{rest...}", "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"):
        rules += f'  "{name}": "b:{name}"\n'
    drops = (
        'drop: ["a:model.layers.1.{rest...}", "a:lm_head.weight", "a:model.norm.weight", "b:model.layers.0.{rest...}"'
    )
    text = f"sources: {{a: {fp8}, b: b}}\noutput: {{path: out}}\n{target}{rules}"
    sm.run(mapping(tmp_path, text + drops + ', "a:model.embed_tokens.weight"]\n'), options=options())
    found, left = tensors(tmp_path / "out"), wide(fp8)
    for name, tensor in found.items():
        assert torch.equal(tensor, (left if "layers.0" in name else tensors(tmp_path / "b"))[name].bfloat16())
    assert "quantization_config" not in config(tmp_path / "out")


# ---- float8 weights under all their names

Q = torch.randint(0, 120, (160, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).view(FP8)
ONE, ROWS, BLOCKS = torch.tensor([0.02]), torch.rand(160, 1) + 0.1, torch.rand(2, 1) + 0.1
EXPERTS = torch.stack([Q, Q])
SPREAD = BLOCKS.repeat_interleave(128, 0)[:160]
KINDS: dict[str, tuple[State, Tensor]] = {
    "DeepSeek, Qwen": ({"m.weight": Q, "m.weight_scale_inv": BLOCKS}, SPREAD),
    "DeepSeek's own code": ({"m.weight": Q, "m.scale": BLOCKS}, SPREAD),
    "ue8m0": (
        {
            "m.weight": Q,
            "m.weight_scale_inv": torch.tensor([[126], [129]], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        },
        torch.tensor([0.5, 4]).repeat_interleave(128)[:160, None],
    ),
    "Mistral": ({"m.weight": Q, "m.qscale_weight": ONE[0], "m.qscale_act": ONE[0]}, ONE),
    "ComfyUI": ({"m.weight": Q, "m.scale_weight": ONE[0], "m.scale_input": ONE[0]}, ONE),
    "ModelOpt": ({"m.weight": Q, "m.weight_scale": ONE[0], "m.input_scale": ONE[0], "m.k_scale": ONE[0]}, ONE),
    "FBGEMM": ({"m.weight": Q, "m.weight_scale": ROWS, "m.input_scale_ub": ONE}, ROWS),
    "bfloat16 scales": ({"m.weight": Q, "m.weight_scale": ROWS.bfloat16()}, ROWS.bfloat16().float()),
    "E5M2": ({"m.weight": Q.float().to(torch.float8_e5m2), "m.weight_scale": ONE}, ONE),
    "experts": ({"m.down_proj": EXPERTS, "m.down_proj_scale_inv": BLOCKS.expand(2, 2, 1)}, SPREAD),
    "experts of FBGEMM": (
        {"m.down_proj": EXPERTS, "m.down_proj_scale": torch.full((2, 160, 1), 0.5)},
        torch.tensor(0.5),
    ),
    "static experts": (
        {
            "m.down_proj": EXPERTS,
            "m.down_proj_scale_inv": BLOCKS.expand(2, 2, 1),
            "m.down_proj_activation_scale": ROWS[:2, 0],
        },
        SPREAD,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_float8_with_scales_is_dequantized(kind: str, tmp_path: Path) -> None:
    state, scale = KINDS[kind]
    write(tmp_path / "src", state | {"norm.weight": torch.ones(4)}, {"quantization_config": {"quant_method": "fp8"}})
    sm.convert(tmp_path / "src", tmp_path / "out", options=options("float32"))
    found = tensors(tmp_path / "out")
    name = next(iter(state))
    assert found.keys() == {name, "norm.weight"}
    assert torch.equal(found[name], state[name].float() * scale)
    assert config(tmp_path / "out") == {"torch_dtype": "float32"}


@pytest.mark.parametrize("name", ["fp8", "fp8_dynamic", "fp8_block", "mxfp8a16"])
def test_float8_of_compressed_tensors(name: str, tmp_path: Path) -> None:
    """Against its own ``decompress``."""
    folder = QUANTIZED / f"compressed-tensors-{name}"
    sm.convert(folder / "model.safetensors", tmp_path / "bare", options=options("float32"))
    sm.convert(folder, tmp_path / "out", options=options("float32"))
    truth = load_file(folder / "truth.safetensors")
    found = tensors(tmp_path / "out")
    assert truth
    assert same({key: found[key] for key in truth}, truth)
    assert same(found, tensors(tmp_path / "bare"))
    assert not [key for key in found if "scale" in key or "zero_point" in key]


def test_blocks_are_those_of_the_config_where_shapes_do_not_tell(tmp_path: Path) -> None:
    """96 rows in 3 parts are blocks of 32 or of 40."""
    state = {"m.weight": Q[:96], "m.weight_scale_inv": torch.rand(3, 1) + 0.1}
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [40, 64]}}
    write(tmp_path / "src", state, said)
    sm.convert(tmp_path / "src", tmp_path / "out", options=options("float32"))
    spread = state["m.weight_scale_inv"].repeat_interleave(40, 0)[:96]
    assert torch.equal(tensors(tmp_path / "out")["m.weight"], state["m.weight"].float() * spread)


def test_the_type_of_the_config_where_no_other_is_asked_for(tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "fp8"}, "text_config": {"dtype": "float16"}}
    write(tmp_path / "src", {"m.weight": Q, "m.weight_scale": ONE}, said)
    rules = "tensors:\n  m.weight: {op: scale, of: src:m.weight, factor: 2}\n"
    sm.run(mapping(tmp_path, f"sources: {{src: src}}\noutput: {{path: out}}\n{rules}"), options=options())
    assert torch.equal(tensors(tmp_path / "out")["m.weight"], (Q.float() * ONE * 2).half())


def test_float8_without_scales_are_numbers(tmp_path: Path) -> None:
    write(tmp_path / "src", {"m.weight": Q, "b.weight": Q}, {"torch_dtype": "float8_e4m3fn"})
    sm.convert(tmp_path / "src", tmp_path / "copy", options=options())
    sm.convert(tmp_path / "src", tmp_path / "out", options=options("bfloat16"))
    assert same(tensors(tmp_path / "copy"), tensors(tmp_path / "src"))
    assert torch.equal(tensors(tmp_path / "out")["m.weight"], Q.bfloat16())


# ---- the others: copied whole, never computed with

U8, I8, I32 = (
    torch.zeros(8, 4, dtype=torch.uint8),
    torch.ones(8, 4, dtype=torch.int8),
    torch.ones(2, 4, dtype=torch.int32),
)
HALF, F32 = torch.ones(8, 1).half(), torch.ones(8, 1)
OTHERS: dict[str, tuple[str, str, State]] = {
    "GPTQ": ("gptq", "m.qweight", {"m.qweight": I32, "m.qzeros": I32, "m.scales": HALF, "m.g_idx": I32[0]}),
    "AWQ": ("awq", "m.qweight", {"m.qweight": I32, "m.qzeros": I32, "m.scales": HALF}),
    "HQQ": ("hqq", "m.W_q", {"m.W_q": U8, "m.scale": HALF, "m.zero": HALF}),
    "EETQ": ("eetq", "m.weight", {"m.weight": I8, "m.weight_scales": HALF[:, 0]}),
    "NVFP4": ("modelopt", "m.weight", {"m.weight": U8, "m.weight_scale": F32.to(FP8), "m.weight_scale_2": F32[0, 0]}),
    "MXFP4": ("mxfp4", "m.gate_up_proj_blocks", {"m.gate_up_proj_blocks": U8, "m.gate_up_proj_scales": U8[:, :1]}),
    "4-bit": ("quark", "m.weight", {"m.weight": U8, "m.weight_scale": U8[:, :1]}),
    "AQLM": ("aqlm", "m.codes", {"m.codes": I8, "m.codebooks": HALF, "m.scales": HALF}),
    "VPTQ": ("vptq", "m.indices", {"m.indices": I32, "m.centroids.weight": HALF}),
    "SpQR": ("spqr", "m.dense_weights", {"m.dense_weights": I32, "m.row_offsets": I32[0], "m.col_vals": I32[0]}),
    "HIGGS": ("higgs", "m.weight", {"m.weight": U8, "m.scales": HALF, "m.tables": HALF, "m.tables2": HALF}),
    "MLX": ("metal", "m.weight", {"m.weight": I32.view(torch.uint32), "m.scales": HALF, "m.biases": HALF}),
    "zero points": ("quark", "m.weight", {"m.weight": Q, "m.weight_scale": ONE, "m.weight_zero_point": ONE}),
    "a method of tomorrow": ("qubits", "m.psi", {"m.psi": U8, "m.phi": HALF}),
}
TITLES = {"4-bit": "quark", "zero points": "fp8 with zero points", "a method of tomorrow": "qubits"}
FILES = sorted(
    p.name for p in QUANTIZED.iterdir() if "fp8" not in p.name.replace("mxfp8", "fp8") or "torchao" in p.name
)


def foreign(name: str, folder: Path) -> Path:
    """A directory of a kind, made here or by its library."""
    if name in FILES:
        return QUANTIZED / name
    method, _, state = OTHERS[name]
    state = state | {"norm.weight": torch.ones(4).bfloat16(), "lm_head.weight": torch.ones(4, 4).bfloat16()}
    return write(folder / "src", state, {"dtype": "bfloat16", "quantization_config": {"quant_method": method}})


REST = 'tensors:\n  "{rest...}": "s:{rest...}"\n'
COPIED = [name for name in [*OTHERS, *FILES] if "torchao" not in name]


@pytest.mark.parametrize("name", COPIED)
def test_codes_are_copied_with_scales_and_config(name: str, tmp_path: Path) -> None:
    source = foreign(name, tmp_path)
    sm.convert(source, tmp_path / "plain", options=options())
    text = f"sources: {{s: {source}}}\noutput: {{path: out}}\ntarget: {{name: hf/model, text: s}}\n"
    sm.run(mapping(tmp_path, text + 'tensors:\n  "{rest...}": "s:{rest...}"\n'), options=options())
    for out in (tmp_path / "plain", tmp_path / "out"):
        assert same(tensors(out), tensors(source))
        assert config(out) == config(source)


@pytest.mark.parametrize("name", [name for name in FILES if "torchao" in name])
def test_codes_whose_meaning_stands_in_a_header_are_not_copied(name: str, tmp_path: Path) -> None:
    """``from_pretrained`` of such a copy fails: Invalid torchao safetensors metadata."""
    with safe_open(QUANTIZED / name / "model.safetensors", "pt") as file:
        assert "Tensor" in json.dumps(file.metadata())
    text = code(lambda: sm.convert(QUANTIZED / name, tmp_path / "out", options=options()))
    assert "packed-weights" in text
    assert "in the headers of its files" in text


@pytest.mark.parametrize("name", COPIED)
def test_codes_are_renamed_with_their_scales(name: str, tmp_path: Path) -> None:
    source = foreign(name, tmp_path)
    text = f'sources: {{s: {source}}}\noutput: {{path: out}}\ntensors:\n  "new.{{rest...}}": "s:{{rest...}}"\n'
    sm.run(mapping(tmp_path, text), options=options())
    assert same(tensors(tmp_path / "out"), {f"new.{key}": value for key, value in tensors(source).items()})


def lora(folder: Path, module: str) -> Path:
    names = (f"base_model.model.{module}.lora_{part}.weight" for part in "AB")
    return write(folder / "lora", {name: torch.ones(4, 4) for name in names}, None)


USES: dict[str, Callable[[str], str]] = {
    "an op": lambda codes: f'tensors:\n  x: {{op: scale, of: "s:{codes}", factor: 2}}\n',
    "a slice": lambda codes: f'tensors:\n  x: {{op: slice, of: "s:{codes}", stop: 1}}\n',
    "an adapter": lambda _: f"adapters: [{{from: l, onto: s, alpha: 4}}]\n{REST}",
    "a target": lambda _: f"target: {{name: hf/llama, text: s}}\n{REST}",
}


# Only the libraries' own files are LLaMAs.
USED = [(name, use) for name in [*OTHERS, *FILES] for use in [*USES, "a cast"] if name in FILES or use != "a target"]


@pytest.mark.parametrize(("name", "use"), USED)
def test_codes_are_never_numbers(name: str, use: str, tmp_path: Path) -> None:
    """Refused, and the format is named."""
    source = foreign(name, tmp_path)
    codes = OTHERS[name][1] if name in OTHERS else next(iter(packed_weights(sm.inspect(source))))
    if use == "a cast":
        text = code(lambda: sm.convert(source, tmp_path / "out", options=options("bfloat16")))
    else:
        lora(tmp_path, codes.removesuffix("._data").rpartition(".")[0])
        adapter = ", l: lora" if use == "an adapter" else ""
        sources = f"sources: {{s: {source}{adapter}}}\noutput: {{path: out}}\n"
        path = mapping(tmp_path, sources + USES[use](codes))
        text = code(lambda: sm.run(path, options=options()))
    assert "packed-weights" in text
    assert (TITLES.get(name) or name.partition("-")[0]).lower() in text.lower()
    assert "16-bit model" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in COPIED if name != "a method of tomorrow"])
def test_codes_without_their_scales_are_refused(name: str, tmp_path: Path) -> None:
    source = foreign(name, tmp_path)
    packed = packed_weights(sm.inspect(source))
    if name == "a method of tomorrow":
        return  # nothing tells which tensors are scales
    for scale in next(iter(packed.values())).scales[:1]:
        text = (
            f's: {source}}}\noutput: {{path: out}}\ntensors:\n  "{{rest...}}": "s:{{rest...}}"\ndrop: ["s:{scale}"]\n'
        )
        assert "codes-without-scales" in code(
            lambda text=text: sm.run(mapping(tmp_path, f"sources: {{{text}"), options=options())
        )


def test_a_module_that_was_trained_whole_does_not_replace_codes(tmp_path: Path) -> None:
    for name in ("GPTQ", "EETQ"):
        source = foreign(name, tmp_path)
        write(tmp_path / "l", {"base_model.model.m.modules_to_save.default.weight": torch.ones(4, 4)}, None)
        text = f"sources: {{s: {source}, l: l}}\noutput: {{path: out}}\nadapters: [{{from: l, onto: s, alpha: 4}}]\n"
        found = code(lambda text=text: sm.run(mapping(tmp_path, text + REST), options=options()))
        assert "packed-weights" in found
        assert name in found


def test_rows_of_codes_are_not_made(tmp_path: Path) -> None:
    """An embedding of 8-bit integers: transformers' ``gemma`` quantization has such."""
    state = {"embed_tokens.weight": I8, "embed_tokens.weight_scale": F32}
    write(tmp_path / "src", state, {"vocab_size": 8, "quantization_config": {"quant_method": "gemma"}})
    target = "target: {name: hf/model, text: s}\n"
    for rows in ("rows: 16", "rows: 4, trim: true"):
        text = f"sources: {{s: src}}\noutput: {{path: out}}\n{target}vocabulary: {{{rows}}}\n{REST}"
        assert "packed-weights" in code(lambda text=text: sm.run(mapping(tmp_path, text), options=options()))


def test_a_cast_of_one_tensor_is_of_numbers(fp8: Path, tmp_path: Path) -> None:
    """Whoever casts some wants numbers, and the config speaks of all."""
    one = "model.layers.0.mlp.up_proj.weight"
    renamed, cast = REST.replace("{rest", "o.{rest", 1), f'  x: {{op: cast, of: "s:{one}", dtype: float32}}\n'
    for number, text in enumerate(
        (
            f"output: {{path: out, dtypes: {{{one}: float32}}}}\n{REST}",
            f"output: {{path: out}}\n{renamed}{cast}",
        )
    ):
        sm.run(mapping(tmp_path, f"sources: {{s: {fp8}}}\n{text}"), tmp_path / f"out{number}", options=options())
        found = tensors(tmp_path / f"out{number}")
        assert not [name for name in found if "scale" in name]
        assert torch.equal(found["x" if number else one], wide(fp8)[one])


def test_a_rule_for_scales_that_are_used_up(fp8: Path, tmp_path: Path) -> None:
    rules = f'{REST}  "old.{{i}}": "s:model.layers.{{i}}.mlp.up_proj.weight_scale_inv"\n'
    path = mapping(tmp_path, f"sources: {{s: {fp8}}}\noutput: {{path: out, dtype: bfloat16}}\n{rules}")
    assert "is part of the dequantized weight by now: remove this rule" in code(lambda: sm.run(path, options=options()))
    drops = 'drop: ["s:{rest...}.weight_scale_inv"]\n'
    path = mapping(tmp_path, f"sources: {{s: {fp8}}}\noutput: {{path: out, dtype: bfloat16}}\n{REST}{drops}")
    sm.run(path, options=options())


def test_a_config_whose_type_is_that_of_the_codes(tmp_path: Path) -> None:
    said = {"torch_dtype": "float8_e4m3fn", "text_config": {"dtype": "float8_e4m3fn"}}
    write(tmp_path / "src", {"m.weight": Q, "m.weight_scale": ONE}, said | {"quantization_config": STATED})
    rules = "target: {name: hf/model, text: s}\ntensors:\n  m.weight: {op: scale, of: s:m.weight, factor: 1}\n"
    sm.run(mapping(tmp_path, f"sources: {{s: src}}\noutput: {{path: out}}\n{rules}"), options=options())
    assert config(tmp_path / "out") == {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    assert tensors(tmp_path / "out")["m.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_files_of_their_own_go_with_codes_and_not_with_numbers(file: str, tmp_path: Path) -> None:
    write(tmp_path / "src", {"m.weight": Q, "m.weight_scale": ONE}, {"torch_dtype": "bfloat16"})
    (tmp_path / "src" / file).write_text('{"quantization": {"quant_algo": "FP8"}}')
    sm.convert(tmp_path / "src", tmp_path / "copy", options=options())
    sm.convert(tmp_path / "src", tmp_path / "out", options=options("bfloat16"))
    assert same(tensors(tmp_path / "copy"), tensors(tmp_path / "src"))
    assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "src" / file).read_bytes()
    assert not (tmp_path / "out" / file).exists()


def test_scales_that_go_to_another_module(fp8: Path, tmp_path: Path) -> None:
    rules = '  "a.{i}.{rest...}.weight_scale_inv": "s:model.layers.{i}.{rest...}.weight_scale_inv"\n'
    rules += '  "b.{i}.{rest...}.weight": "s:model.layers.{i}.{rest...}.weight"\n'
    drops = (
        'drop: ["s:{rest...}.input_scale", "s:lm_head.weight", "s:model.norm.weight", "s:model.embed_tokens.weight"]\n'
    )
    path = mapping(tmp_path, f"sources: {{s: {fp8}}}\noutput: {{path: out}}\ntensors:\n{rules}{drops}")
    text = code(lambda: sm.run(path, options=options()))
    assert "codes-without-scales" in text
    assert "a.0.mlp.down_proj.weight_scale_inv beside b.0.mlp.down_proj.weight" in text


# ---- configs that contradict the weights


def test_numbers_under_a_config_of_codes(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Somebody dequantized the weights and left the config."""
    llama.save_pretrained(tmp_path / "src")
    write(tmp_path / "src", tensors(tmp_path / "src"), config(tmp_path / "src") | {"quantization_config": STATED})
    result = sm.convert(tmp_path / "src", tmp_path / "out", options=options())
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "src"))
    assert "quantization_config" not in config(tmp_path / "out")
    assert "config.json says fp8, and all weights are numbers" in result.plan.warnings[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_scaled_codes_under_a_config_that_does_not_say_so(fp8: Path, numbers: State, tmp_path: Path) -> None:
    plain = {key: value for key, value in config(fp8).items() if key != "quantization_config"}
    write(tmp_path / "src", tensors(fp8), plain)
    result = sm.convert(tmp_path / "src", tmp_path / "out", options=options())
    assert same(tensors(tmp_path / "out"), numbers)
    assert "does not say that they are scaled" in result.plan.warnings[0]


def test_codes_of_others_under_a_config_that_does_not_say_so(tmp_path: Path) -> None:
    write(tmp_path / "src", OTHERS["GPTQ"][2], {"model_type": "llama"})
    result = sm.convert(tmp_path / "src", tmp_path / "out", options=options())
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "src"))
    assert "quantized (GPTQ), and config.json does not say so" in result.plan.warnings[0]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_numbers_beside_block_scales(fp8: Path, tmp_path: Path, dtype: str | None) -> None:
    """What a cast without the scales leaves, or a dequantization that left them: nobody can tell."""
    state = {name: t.bfloat16() if t.dtype == FP8 else t for name, t in tensors(fp8).items()}
    write(tmp_path / "src", state, config(fp8))
    text = code(lambda: sm.convert(tmp_path / "src", tmp_path / "out", options=options(dtype)))
    assert "scales-beside-numbers" in text
    # The hint, followed to the letter.
    line = text.partition("under `drop:` `")[2].partition("`")[0].replace("source:", "s:")
    rules = f'{REST}drop:\n  {line}\n  - "s:{{rest...}}.input_scale"\n'
    target = "target: {name: hf/model, text: s}\n"
    path = mapping(tmp_path, f"sources: {{s: src}}\noutput: {{path: out}}\n{target}{rules}")
    sm.run(path, options=options(dtype))
    assert same(tensors(tmp_path / "out"), {k: v for k, v in state.items() if not k.endswith(("scale", "scale_inv"))})
    assert "quantization_config" not in config(tmp_path / "out")


def test_a_weight_that_lost_its_scale(fp8: Path, tmp_path: Path) -> None:
    state = tensors(fp8)
    del state["model.layers.0.mlp.up_proj.weight_scale_inv"]
    write(tmp_path / "src", state, config(fp8))
    text = code(lambda: sm.convert(tmp_path / "src", tmp_path / "out", options=options("bfloat16")))
    assert "missing-scales" in text
    assert "model.layers.0.mlp.up_proj.weight" in text
    write(tmp_path / "none", {k: v for k, v in state.items() if "scale" not in k}, config(fp8))
    assert "missing-scales" in code(lambda: sm.convert(tmp_path / "none", tmp_path / "out", options=options()))


def test_scales_of_another_model(fp8: Path, tmp_path: Path) -> None:
    state = tensors(fp8) | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(5, 3)}
    write(tmp_path / "src", state, config(fp8))
    text = code(lambda: sm.convert(tmp_path / "src", tmp_path / "out", options=options("bfloat16")))
    assert "odd-scales" in text
    assert "[5, 3]" in text


def test_a_config_that_only_describes_another_source(fp8: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Trained 16-bit weights with the config of the quantized model they came from."""
    llama.save_pretrained(tmp_path / "trained")
    for base in (fp8, foreign("GPTQ", tmp_path)):
        target = "target: {name: hf/model, text: base}\n"
        text = f"sources: {{base: {base}, trained: trained}}\noutput: {{path: out}}\n{target}"
        rules = 'tensors:\n  "{rest...}": ["trained:{rest...}", "base:{rest...}"]\ndrop: ["base:{rest...}"]\n'
        sm.run(mapping(tmp_path, text + rules), tmp_path / f"out-{base.name}", options=options())
        assert same(tensors(tmp_path / f"out-{base.name}"), tensors(tmp_path / "trained"))
        assert "quantization_config" not in config(tmp_path / f"out-{base.name}")


def test_numbers_in_the_place_of_codes(tmp_path: Path) -> None:
    source = foreign("GPTQ", tmp_path)
    state = tensors(source)
    write(source, state | {f"o.{k[2:]}": v for k, v in state.items() if k.startswith("m.")}, config(source))
    write(tmp_path / "b", {"m.weight": torch.ones(4, 4)}, None)
    target = "target: {name: hf/model, text: s}\n"
    rules = 'tensors:\n  "{rest...}": "s:{rest...}"\n  m.weight: b:m.weight\ndrop: ["s:m.{rest...}"]\n'
    path = mapping(tmp_path, f"sources: {{s: src, b: b}}\noutput: {{path: out}}\n{target}{rules}")
    assert "mixed-quantization" in code(lambda: sm.run(path, options=options()))
    target = "target: {name: hf/model, text: b}\n"
    (tmp_path / "b/config.json").write_text("{}")
    path = mapping(tmp_path, f"sources: {{s: src, b: b}}\noutput: {{path: out}}\n{target}{rules}")
    assert "mixed-quantization" in code(lambda: sm.run(path, options=options()))


@pytest.mark.parametrize("named", ["model.gate", "*model.gate*"])
def test_modules_that_the_config_names_are_not_renamed(tmp_path: Path, named: str) -> None:
    state = {"model.m.weight": Q, "model.m.weight_scale_inv": BLOCKS, "model.gate.weight": torch.ones(4, 4)}
    said = {"quant_method": "fp8", "modules_to_not_convert": [named]}
    write(tmp_path / "src", state, {"quantization_config": said})
    rules = 'target: {name: hf/model, text: s}\ntensors:\n  "text.{rest...}": "s:model.{rest...}"\n'
    path = mapping(tmp_path, f"sources: {{s: src}}\noutput: {{path: out}}\n{rules}")
    text = code(lambda: sm.run(path, options=options()))
    assert "stale-quantization" in text
    assert "model.gate" in text
    sm.run(path, options=options("bfloat16"))  # as the hint says
    assert "quantization_config" not in config(tmp_path / "out")


# ---- what the command says


def test_the_warning_is_shown_to_who_wants_to_see_nothing(fp8: Path, tmp_path: Path) -> None:
    done = shardmerge("convert", fp8, tmp_path / "out", "--dtype", "bf16", "-q", "--no-sync")
    assert "14 float8 weights dequantized" in done.stderr
    planned = shardmerge("convert", fp8, tmp_path / "two", "--dtype", "bf16", "--dry-run").stdout
    assert "dequantized (blocks 64 x 64)" in planned


def test_only_float8_with_scales_counts_as_such() -> None:
    found = {name: len(fp8_weights(sm.inspect(QUANTIZED / name))) for name in FILES}
    assert not any(found.values())


# ---- the language model of a LLaVA


def llava(folder: Path, llm: Path) -> Path:
    """A run that trained the projector alone, so that everything else comes from the pretrained parts."""
    golden = GOLDEN / "xtuner"
    entry = json.loads((golden / "pretrain_z2/case.json").read_text())["entry"]
    run = f"sources: {{trained: {golden / 'pretrain_z2' / entry}, llm: {llm}, vision: {golden / 'base_clip'}}}\n"
    return mapping(folder, f"{run}output: {{path: out, dtype: bfloat16}}\nuse: xtuner/llava-to-hf\n")


def spoilt_llm(folder: Path, change: Callable[[str, Tensor], State], said: dict) -> Path:
    """The pretrained language model, its linear layers changed."""
    source = GOLDEN / "xtuner/base_llm"
    shutil.copytree(source, folder)
    state: State = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        state |= change(name, tensor) if "_proj" in name else {name: tensor}
    return write(folder, state, config(source) | {"quantization_config": said})


def test_a_llava_of_a_float8_language_model(tmp_path: Path) -> None:
    def rows(name: str, tensor: Tensor) -> State:
        scale = tensor.float().abs().amax(1, keepdim=True) / 448
        return {name: (tensor.float() / scale).to(FP8), f"{name}_scale": scale}

    llm = spoilt_llm(tmp_path / "llm", rows, {"quant_method": "fbgemm_fp8"})
    result = sm.run(llava(tmp_path, llm), options=options())
    found, state = tensors(tmp_path / "out"), tensors(llm)
    codes = [name for name in state if state[name].dtype == FP8]
    assert len(codes) == 14
    for name in codes:
        assert torch.equal(found[f"language_model.{name}"], (state[name].float() * state[f"{name}_scale"]).bfloat16())
    assert not [name for name in found if "scale" in name]
    assert "quantization" not in json.dumps(config(tmp_path / "out"))
    assert any("14 float8 weights dequantized" in text for text in result.plan.warnings)


def test_a_llava_of_a_language_model_of_other_codes(tmp_path: Path) -> None:
    def gptq(name: str, tensor: Tensor) -> State:
        stem = name.removesuffix("weight")
        words = torch.zeros(tensor.shape[1] // 8, tensor.shape[0], dtype=torch.int32)
        return {f"{stem}qweight": words, f"{stem}scales": torch.ones(1, tensor.shape[0]).half()}

    def nf4(name: str, tensor: Tensor) -> State:
        return {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(4)}

    for title, change in (("GPTQ", gptq), ("bitsandbytes", nf4)):
        llm = spoilt_llm(tmp_path / title, change, {"quant_method": title.lower()})
        text = code(lambda llm=llm: sm.run(llava(tmp_path, llm), options=options()))
        assert "packed-weights" in text
        assert title.lower() in text.lower()
        assert "let `llm` be the 16-bit model" in text
