"""The target peft/adapter, and what all targets have in common. The judge of an adapter's directory is peft."""

import json

import pytest

from shardmerge.errors import ShardmergeError
from shardmerge.targets import peft_adapter, peft_export
from shardmerge.targets.expectation import Request
from shardmerge.targets.registry import TARGETS
from tests.target_files import catalog, read, side_file, written

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft 0.21 asks transformers 5.24
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'"
    ),  # peft 0.21 takes a lora_bias for a torn tensor, and loads it
]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Settings of a LoraConfig, and what of the result only the user can say.
ADAPTERS = {
    "plain": {"target_modules": LINEAR, "task_type": "CAUSAL_LM"},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"model.layers.1.self_attn.v_proj": 2}},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "lora bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "trained bias": {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
}


def base():
    config = transformers.LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def wrapped(settings):
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or (parameter.requires_grad and name.endswith(".bias")):
            torch.nn.init.normal_(parameter)
    return model.eval()


def trained(model, folder, prefix=""):
    """What a training run saves: the parameters that it trains, as the wrapped model calls them."""
    tensors = {prefix + name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    return catalog(folder, tensors)


@pytest.mark.parametrize("case", ADAPTERS)
def test_peft_loads_what_it_trained(tmp_path, case):
    model = wrapped(ADAPTERS[case])
    options = {"alpha": "6", "rslora": str("use_rslora" in ADAPTERS[case]).lower(), "task_type": "CAUSAL_LM"}
    catalogs = {"trained": trained(model, tmp_path / "t", "llm.")}
    expectation = peft_export.expect(Request({}, options, catalogs, read))
    oracle = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert expectation.tensors == {name: tuple(tensor.shape) for name, tensor in oracle.items()}
    folder = written(expectation, tmp_path / "out")
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({name: t.detach().clone() for name, t in oracle.items()}, folder / "adapter_model.safetensors")
    again = peft.PeftModel.from_pretrained(base(), folder).eval()
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert sum(".lora_" in name for name, _ in again.named_parameters()) == sum(
        ".lora_" in name for name, _ in model.named_parameters()
    )


def test_a_config_beside_the_adapter_is_kept(tmp_path):
    model = wrapped(ADAPTERS["plain"])
    own = {"r": 4, "lora_alpha": 12.0, "use_dora": False, "target_modules": LINEAR, "peft_type": "LORA", "extra": 1}
    entries = trained(model, tmp_path / "x").entries
    tensors = {peft_adapter.saved_name(name): entry.shape for name, entry in entries.items()}
    adapter = catalog(tmp_path / "t", tensors, adapter_config=own)
    expectation = peft_export.expect(Request({}, {"base": "org/base"}, {"trained": adapter}, read))
    config = side_file(expectation, "adapter_config.json")
    assert (config["lora_alpha"], config["base_model_name_or_path"], config["extra"]) == (12, "org/base", 1)
    assert config["target_modules"] == LINEAR


@pytest.mark.parametrize(
    ("names", "options", "code"),
    [
        ({"x.weight": (2, 2)}, {"alpha": "1"}, "no-adapter"),
        ({"base_model.model.a.lora_A.weight": (2, 2)}, {}, "adapter-alpha"),
        ({"base_model.model.a.lora_A.weight": (2, 2)}, {"alpha": "none"}, "bad-option"),
        ({"a.base_model.model.x.lora_A.weight": (2, 2), "b.base_model.model.x.lora_A.weight": (2, 2)},
         {"alpha": "1"}, "no-adapter"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, names, options, code):
    with pytest.raises(ShardmergeError) as caught:
        peft_export.expect(Request({}, options, {"trained": catalog(tmp_path / "t", names)}, read))
    assert caught.value.code == code


# ---- every target


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_says_what_it_is(name):
    target = TARGETS[name]
    assert target.name == name
    assert target.about.endswith(".")
    assert target.roles
    assert not set(target.roles) & set(target.options)
    assert all(target.roles.values())
    assert all(target.options.values())


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_without_sources_says_what_it_lacks(name):
    with pytest.raises(ShardmergeError) as caught:
        TARGETS[name].expect(Request({}, {}, {}, read, where="mapping.yaml:3:1"))
    assert {problem.code for problem in caught.value.each()} == {"missing-source"}
    json.dumps([problem.lines() for problem in caught.value.each()])


# ---- one whole adapter, or none


@pytest.mark.parametrize(
    ("names", "config", "code"),
    [
        ({"base_model.model.a.lora_A.one.weight": (2, 2), "base_model.model.a.lora_A.two.weight": (2, 2)}, {},
         "adapter-alpha"),
        ({"base_model.model.a.lora_A.one.weight": (2, 2), "base_model.model.b.modules_to_save.two.weight": (2, 2)}, {},
         "adapter-alpha"),
        ({"base_model.model.a.lora_A.weight": (2, 2), "base_model.model.a.lora_B.weight": (0,)}, {}, "empty-adapter"),
        ({"base_model.model.a.lora_A.weight": (2, 2)}, {"r": 4}, "adapter-rank"),
        ({"base_model.model.a.lora_A.weight": (2, 2)}, {"lora_alpha": float("nan")}, "odd-setting"),
        ({"base_model.model.a.lora_A.weight": (2, 2)}, {"use_rslora": "no"}, "odd-setting"),
    ],
)  # fmt: skip
def test_what_is_not_one_whole_adapter_is_not_exported(tmp_path, names, config, code):
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    source = catalog(tmp_path / "t", names, adapter_config=own)
    with pytest.raises(ShardmergeError) as caught:
        peft_export.expect(Request({}, {}, {"trained": source}, read))
    assert caught.value.code == code


def test_the_frozen_base_of_a_zero_checkpoint_is_no_part_of_the_adapter(tmp_path):
    """DeepSpeed's default keeps the frozen base in the checkpoint, and says so of each tensor."""
    import shutil

    from safetensors.torch import load_file

    import shardmerge as sm
    from tests.conftest import GOLDEN, read_all

    case = GOLDEN / "zero" / "lora_z2_w2_bf16"
    shutil.copytree(case / "ckpt", tmp_path / "ck")
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "ck" / "adapter_config.json").write_text(json.dumps(own))
    sm.convert(tmp_path / "ck", tmp_path / "out", use="peft/export", options=sm.Options(sync=False))
    truth = load_file(case / "truth.safetensors")
    wanted = {name.replace(".default", ""): tensor for name, tensor in truth.items() if ".lora_" in name}
    found = read_all(sm.inspect(tmp_path / "out"))
    assert set(found) == set(wanted)
    assert all((found[name] == tensor.float().numpy()).all() for name, tensor in wanted.items())
