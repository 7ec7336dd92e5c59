"""The targets official/llava and xtuner/llava, against XTuner's own files and the models that they describe."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest

from shardmerge.dtypes import DTYPES
from shardmerge.errors import ShardmergeError
from shardmerge.targets.expectation import Request, Vocabulary
from shardmerge.targets.llava import official as llava_official
from shardmerge.targets.llava import xtuner as llava_xtuner
from tests.conftest import shardmerge
from tests.target_files import catalog, read, save_tokenizer, side_file, written

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safe_open = pytest.importorskip("safetensors").safe_open

GOLDEN = Path(__file__).parent / "golden" / "xtuner"

# What `xtuner convert pth_to_hf --save-format xtuner` of XTuner 0.2.0 wrote beside a projector of these sizes.
XTUNER_PROJECTOR = {
    "architectures": ["ProjectorModel"],
    "auto_map": {
        "AutoConfig": "configuration_projector.ProjectorConfig", "AutoModel": "modeling_projector.ProjectorModel",
    },
    "bias": True, "depth": 2, "hidden_act": "gelu", "llm_hidden_size": 12, "model_type": "projector",
    "torch_dtype": "float32", "visual_hidden_size": 20,
}  # fmt: skip


def golden(case, folder):
    """A run's tensors by name and shape, with its training config."""
    with safe_open(GOLDEN / case / "truth.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return catalog(folder, tensors, training_config=(GOLDEN / case / "config.py").read_text())


def request(case, tmp_path, dtype=None, **options):
    catalogs = {
        "trained": golden(case, tmp_path / "trained"),
        "llm": catalog(GOLDEN / "base_llm"),
        "vision": catalog(GOLDEN / "base_clip"),
    }
    return Request({}, options, catalogs, read, dtype)


def with_prefix(model, prefix):
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def on_meta(kind, folder, part=None):
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return kind(getattr(config, part) if part else config)


def llama_names():
    return with_prefix(on_meta(transformers.LlamaForCausalLM, GOLDEN / "base_llm"), "")


def clip_names(prefix):
    """CLIPVisionModel has no `vision_model.` in memory from transformers 5.6 on; every file has it."""
    names = with_prefix(on_meta(transformers.CLIPVisionModel, GOLDEN / "base_clip", "vision_config"), "")
    return {prefix + "vision_model." + name.removeprefix("vision_model."): shape for name, shape in names.items()}


# ---- xtuner/llava

PARTS = {
    "pretrain_z2": {"projector"},
    "frozen_z2": {"", "projector"},
    "single_frozen": {"", "projector"},
    "single_trainvit": {"", "projector", "visual_encoder"},
    "lora_llm": {"llm_adapter", "projector"},
    "lora_both": {"llm_adapter", "projector", "visual_encoder_adapter"},
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_are_those_of_the_checkpoint(tmp_path, case):
    expectation = llava_xtuner.expect(request(case, tmp_path))
    assert {group.folder for group in expectation.groups} == PARTS[case]
    assert expectation.groups[-1].prefix == "" or "" not in PARTS[case]
    for name in expectation.tensors:
        assert any(name.startswith(group.prefix) for group in expectation.groups)
    files = {file.name for file in expectation.side_files}
    assert {"projector/config.json", "projector/modeling_projector.py"} <= files
    assert ("config.json" in files) is ("" in PARTS[case])
    assert ("tokenizer.json" in files) is ("" in PARTS[case])
    assert ("visual_encoder/preprocessor_config.json" in files) is ("visual_encoder" in PARTS[case])
    assert not expectation.warnings


def test_names_and_shapes_of_whole_parts(tmp_path):
    expectation = llava_xtuner.expect(request("single_trainvit", tmp_path))
    projector = {name: shape for name, shape in expectation.tensors.items() if name.startswith("projector/")}
    assert projector == {
        "projector/model.0.weight": (12, 20), "projector/model.0.bias": (12,),
        "projector/model.2.weight": (12, 12), "projector/model.2.bias": (12,),
    }  # fmt: skip
    assert expectation.tensors == llama_names() | clip_names("visual_encoder/") | projector


def test_the_configs_are_xtuners(tmp_path):
    expectation = llava_xtuner.expect(request("single_trainvit", tmp_path, DTYPES["F32"]))
    assert side_file(expectation, "projector/config.json") == XTUNER_PROJECTOR
    folder = written(expectation, tmp_path / "out")
    theirs = transformers.AutoConfig.from_pretrained(GOLDEN / "base_llm").to_dict()
    ours = transformers.AutoConfig.from_pretrained(folder).to_dict()
    assert ours | {"dtype": theirs["dtype"], "_name_or_path": theirs["_name_or_path"]} == theirs
    ours = transformers.AutoConfig.from_pretrained(folder / "visual_encoder")
    theirs = transformers.AutoConfig.from_pretrained(GOLDEN / "base_clip").vision_config
    assert ours.architectures == ["CLIPVisionModel"]
    own = dict.fromkeys(("architectures", "dtype", "_name_or_path"))
    assert ours.to_dict() | own == theirs.to_dict() | own


@pytest.mark.usefixtures("remote_code")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_projector_of_any_depth_loads_and_computes(tmp_path, depth):
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {f"projector.model.{2 * i}.weight": (12, 12 if i else 20) for i in range(depth)}
    trained = catalog(tmp_path / "trained", tensors)
    expectation = llava_xtuner.expect(Request({}, {}, {"trained": trained}, read, DTYPES["F32"]))
    folder = written(expectation, tmp_path / "out") / "projector"
    generator = torch.Generator().manual_seed(depth)
    weights = {
        name.removeprefix("projector/"): torch.randn(shape, generator=generator)
        for name, shape in expectation.tensors.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    x = torch.randn(3, 20, generator=generator)
    y = x
    for index in range(depth):
        y = torch.nn.functional.gelu(y) if index else y
        y = y @ weights[f"model.{2 * index}.weight"].T + weights[f"model.{2 * index}.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks transformers 5.24
@pytest.mark.parametrize(("folder", "rank", "alpha", "base"), [
    ("llm_adapter", 4, 8, "base_llm"), ("visual_encoder_adapter", 2, 1, "base_clip"),
])  # fmt: skip
def test_peft_reads_the_adapters(tmp_path, folder, rank, alpha, base):
    peft = pytest.importorskip("peft")
    expectation = llava_xtuner.expect(request("lora_both", tmp_path))
    config = peft.PeftConfig.from_pretrained(written(expectation, tmp_path / "out") / folder)
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (rank, alpha, base)
    config.base_model_name_or_path = None  # as of the models made here
    parts = {
        "llm_adapter": on_meta(transformers.LlamaForCausalLM, GOLDEN / "base_llm"),
        "visual_encoder_adapter": on_meta(transformers.CLIPVisionModel, GOLDEN / "base_clip", "vision_config"),
    }
    with torch.device("meta"):
        wrapped = peft.get_peft_model(parts[folder], config)
    oracle = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(wrapped).items()}
    ours = {
        name.removeprefix(f"{folder}/").replace(".model.vision_model.", ".model."): shape
        for name, shape in expectation.tensors.items()
        if name.startswith(f"{folder}/")
    }
    assert ours == {name.replace(".model.vision_model.", ".model."): shape for name, shape in oracle.items()}


def test_alpha_of_the_option_wins(tmp_path):
    expectation = llava_xtuner.expect(request("lora_both", tmp_path, llm_alpha="32", vision_alpha="0.5"))
    assert side_file(expectation, "llm_adapter/adapter_config.json")["lora_alpha"] == 32
    assert side_file(expectation, "visual_encoder_adapter/adapter_config.json")["lora_alpha"] == 0.5


def test_an_adapter_without_alpha(tmp_path):
    layer = "llm.base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        "projector.model.0.weight": (12, 20),
        f"{layer}.lora_A.default.weight": (4, 12),
        f"{layer}.lora_B.default.weight": (12, 4),
    }
    with pytest.raises(ShardmergeError) as caught:
        llava_xtuner.expect(Request({}, {}, {"trained": catalog(tmp_path / "t", tensors)}, read))
    assert caught.value.code == "adapter-alpha"


def test_a_checkpoint_without_projector(tmp_path):
    with pytest.raises(ShardmergeError) as caught:
        llava_xtuner.expect(Request({}, {}, {"trained": catalog(tmp_path / "t", {"x": (1,)})}, read))
    assert caught.value.code == "no-projector"


def test_a_trained_part_needs_its_base(tmp_path):
    catalogs = {"trained": golden("single_trainvit", tmp_path / "trained")}
    with pytest.raises(ShardmergeError) as caught:
        llava_xtuner.expect(Request({}, {}, catalogs, read))
    assert [problem.hint for problem in caught.value.each()] == ["llm: base_llm", "vision: base_clip"]


def test_a_base_that_is_missing_on_the_command_line_is_an_option_to_paste(tmp_path):
    for file in ("iter_2.pth", "config.py"):
        shutil.copy(GOLDEN / "single_frozen" / file, tmp_path)
    command = ["convert", tmp_path / "iter_2.pth", tmp_path / "out", "--use", "xtuner/llava-to-hf"]
    errors = json.loads(shardmerge(*command, "--json", code=1).stdout)["errors"]
    assert [error["hint"] for error in errors] == ["--base llm=base_llm", "--base vision=base_clip"]

    options = [error["hint"].replace("=", f"={GOLDEN}/").split() for error in errors]
    shardmerge(*command, *chain(*options))


# ---- official/llava


def official_names(*, tower, depth=2):
    """llava_arch.py and multimodal_projector/builder.py of LLaVA 1.2.2, by hand, with the parts' own names."""
    names = llama_names()
    for index in range(depth):
        names[f"model.mm_projector.{2 * index}.weight"] = (12, 12 if index else 20)
        names[f"model.mm_projector.{2 * index}.bias"] = (12,)
    return names | (clip_names("model.vision_tower.vision_tower.") if tower else {})


@pytest.mark.parametrize("case", PARTS)
def test_official_names(tmp_path, case):
    tower = case in ("single_trainvit", "lora_both")
    expectation = llava_official.expect(request(case, tmp_path))
    assert expectation.tensors == official_names(tower=tower)
    assert side_file(expectation, "config.json")["unfreeze_mm_vision_tower"] is tower


def test_official_tower_as_asked(tmp_path):
    wanted = request("frozen_z2", tmp_path, tower="true", vision_tower="openai/clip-vit-large-patch14-336")
    expectation = llava_official.expect(wanted)
    assert expectation.tensors == official_names(tower=True)
    config = side_file(expectation, "config.json")
    assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    assert not llava_official.expect(request("single_trainvit", tmp_path, tower="false")).tensors.keys() & clip_names(
        "model.vision_tower.vision_tower."
    )


def test_official_config_is_the_language_models_with_xtuners_fields(tmp_path):
    expectation = llava_official.expect(request("frozen_z2", tmp_path, DTYPES["BF16"]))
    config = side_file(expectation, "config.json")
    base = json.loads((GOLDEN / "base_llm" / "config.json").read_text())
    # xtuner/model/llava.py, to_official_llava, and `LlavaConfig.model_type` of LLaVA.
    fields = {
        "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad", "mm_hidden_size": 20,
        "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "mm_vision_tower": "base_clip",
        "model_type": "llava_llama", "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True,
    }  # fmt: skip
    expected = {key: value for key, value in base.items() if key not in ("transformers_version", "rope_scaling")}
    assert config == expected | fields
    llama = transformers.LlamaConfig.from_pretrained(written(expectation, tmp_path / "out"))
    assert (llama.hidden_size, llama.vocab_size) == (12, 298)
    files = {file.name for file in expectation.side_files}
    assert {"generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    assert side_file(expectation, "tokenizer.json") == json.loads((GOLDEN / "base_llm" / "tokenizer.json").read_text())


def test_official_without_a_vision_source(tmp_path):
    wanted = request("pretrain_z2", tmp_path)
    catalogs = {name: value for name, value in wanted.catalogs.items() if name != "vision"}
    expectation = llava_official.expect(Request({}, {}, catalogs, read))
    assert expectation.tensors == official_names(tower=False)
    assert not any(file.name.startswith("preprocessor") for file in expectation.side_files)


def test_official_vocabulary(tmp_path):
    save_tokenizer(tmp_path / "llm", 40)
    text = {"model_type": "llama", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
    catalogs = {
        "trained": catalog(tmp_path / "t", {"mm_projector.0.weight": (12, 20), "mm_projector.2.weight": (12, 12)}),
        "llm": catalog(tmp_path / "llm", config=text),
        "vision": catalog(GOLDEN / "base_clip"),
    }
    vocabulary = Vocabulary(rows=42, trim=True, tokens=("<x>",))
    expectation = llava_official.expect(Request({}, {}, catalogs, read, vocabulary=vocabulary))
    assert expectation.tensors["lm_head.weight"] == (42, 12)
    assert side_file(expectation, "config.json")["vocab_size"] == 42
    assert side_file(expectation, "tokenizer.json")["added_tokens"][-1]["content"] == "<x>"
