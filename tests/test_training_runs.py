"""What lies beside an adapter or a projector of LLaVA's own training is used, or contradicted aloud."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

import shardmerge as sm
from shardmerge.errors import ShardmergeError
from tests.target_files import save_tokenizer
from tests.test_no_default_architecture import EYE, LLAMA, OFFICIAL, projector, shaken, write

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

RUN = OFFICIAL | {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a CLIP, and an adapter that peft made for the language model."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    llm = shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    llm.save_pretrained(folder / "llm")
    shaken(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**EYE))).save_pretrained(folder / "clip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a name that is going to change
        adapted = peft.get_peft_model(llm, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
        shaken(adapted).save_pretrained(folder / "adapter")
    return folder


def run_of(world: Path, folder: Path, config: dict[str, object], *, adapter: bool = True) -> dict[str, str]:
    """What LLaVA's LoRA script leaves, and the sources of the preset."""
    folder.mkdir()
    bases = {"vision": str(world / "clip"), "projector": str(folder / "non_lora_trainables.bin")}
    for path in (world / "adapter").glob("adapter_*") if adapter else ():
        (folder / path.name).write_bytes(path.read_bytes())
        bases["adapter"] = str(folder)
    torch.save(
        {f"base_model.model.{name}": one for name, one in projector().items()}, folder / "non_lora_trainables.bin"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return bases


def config_of(out: Path) -> dict[str, object]:
    found = json.loads((out / "config.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("adapter", [True, False])
def test_the_runs_own_config_says_the_wiring(adapter: bool, world: Path, tmp_path: Path) -> None:
    bases = run_of(world, tmp_path / "run", RUN, adapter=adapter)
    out = sm.convert(world / "llm", tmp_path / "out", use="llava/official-to-hf", bases=bases).path
    config = config_of(out)
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")
    # The class token too.
    assert config["image_seq_length"] == 5


def test_a_llava_as_base_gives_way_to_the_run(world: Path, tmp_path: Path) -> None:
    tensors = transformers.LlamaForCausalLM.from_pretrained(world / "llm").state_dict()
    base = write(tmp_path / "base", tensors, OFFICIAL)
    bases = run_of(world, tmp_path / "run", RUN)
    config = config_of(sm.convert(base, tmp_path / "out", use="llava/official-to-hf", bases=bases).path)
    assert config["vision_feature_layer"] == -1


def test_the_image_processor_of_the_run(world: Path, tmp_path: Path) -> None:
    bases = run_of(world, tmp_path / "run", RUN)
    mean = {"image_mean": [0.1, 0.2, 0.3], "image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "run" / "preprocessor_config.json").write_text(json.dumps(mean))
    out = sm.convert(world / "llm", tmp_path / "out", use="llava/official-to-hf", bases=bases).path
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]


def test_the_tokenizer_of_the_run(world: Path, tmp_path: Path) -> None:
    """It has the tokens that the training added; one that the vocabulary has no row for makes rows."""
    bases = run_of(world, tmp_path / "run", RUN)
    save_tokenizer(tmp_path / "run", 62, added=("<unk>", "<s>", "</s>", "<im_start>"))
    out = sm.convert(world / "llm", tmp_path / "out", use="llava/official-to-hf", bases=bases).path
    tokens = transformers.AutoTokenizer.from_pretrained(out)
    assert tokens.convert_tokens_to_ids(["<im_start>", "<image>", "<pad>"]) == [62, 63, 64]
    config = config_of(out)
    assert config["image_token_index"] == 63
    assert config["text_config"]["vocab_size"] == 128


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"rope_theta": 500000.0}, "contradiction", "rope_theta"),
        ({"rms_norm_eps": 1e-6}, "contradiction", "rms_norm_eps"),
        ({"num_attention_heads": 8}, "contradiction", "num_attention_heads"),
        ({"model_type": "llava_mistral", "architectures": None}, "contradiction", "model_type"),
        ({"model_type": "llava_gemma", "architectures": None}, "contradiction", "model_type"),
        ({"model_type": "llava_mpt", "architectures": None}, "unsupported-architecture", "llava_mpt"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
            "unsupported-architecture",
            "anyres",
        ),
        ({"mm_projector_type": "mlp3x_gelu"}, "projector-depth", "mlp3x_gelu"),
        ({"mm_vision_select_feature": "all"}, "odd-config", "mm_vision_select_feature"),
    ],
)
def test_a_run_of_something_else_is_refused(
    change: dict[str, object], code: str, named: str, world: Path, tmp_path: Path
) -> None:
    bases = run_of(world, tmp_path / "run", RUN | change)
    with pytest.raises(ShardmergeError) as caught:
        sm.convert(world / "llm", tmp_path / "out", use="llava/official-to-hf", bases=bases)
    assert code in [one.code for one in caught.value.each()]
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_two_runs_are_one_too_many(world: Path, tmp_path: Path) -> None:
    bases = run_of(world, tmp_path / "run", RUN)
    other = run_of(world, tmp_path / "other", OFFICIAL, adapter=False)
    with pytest.raises(ShardmergeError, match="runs of different settings") as caught:
        sm.convert(
            world / "llm", tmp_path / "out", use="llava/official-to-hf", bases=bases | {"projector": other["projector"]}
        )
    assert "mm_vision_select_layer -1" in caught.value.found
    # The hint: sources that belong together.
    assert sm.convert(world / "llm", tmp_path / "out", use="llava/official-to-hf", bases=bases)


def test_a_config_beside_a_projector_that_is_no_llavas_is_no_matter(world: Path, tmp_path: Path) -> None:
    bases = run_of(world, tmp_path / "run", {"model_type": "gpt2"}, adapter=False)
    config = config_of(sm.convert(world / "llm", tmp_path / "out", use="llava/official-to-hf", bases=bases).path)
    assert config["vision_feature_layer"] == -2
