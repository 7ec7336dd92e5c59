"""What lies beside the weights comes along, by one rule for all targets; links never bring in what lies outside."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge.tensors.file_roles import comes_along, left_behind, training_state
from tests.conftest import shardmerge

# What the hub's models have beside their weights, and what training runs leave there.
OF_THE_MODEL = (
    "configuration_x.py", "modeling_x.py", "tokenization_x.py", "package/__init__.py", "package/inner/deep.py",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "qwen.tiktoken",
    "vocab.json", "merges.txt", "special_tokens_map.json", "source.spm", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/rag.jinja", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "mel_filters.npz", "spm.vocab", "modules.json", "1_Pooling/config.json", "LICENSE",
    "LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md", "quantize_config.json", "params.json",
)  # fmt: skip
OF_THE_RUN = (
    "trainer_state.json", "all_results.json", "train_results.json", "training_args.bin", "training_args.yaml",
    "zero_to_fp32.py", "rng_state.pth", "scheduler.pt", "optimizer.pt", "trainer_log.jsonl", "training_loss.png",
    "events.out.tfevents.1.host", "train.log", "model.safetensors.index.json", "adapter_config.json.old",
    ".gitattributes", "shardmerge.json", "runs/a.txt", "checkpoint-5/config.json", "wandb/run.json", "model.gguf",
    "__pycache__/x.pyc",
)  # fmt: skip


def folder_of(tmp_path: Path, *files: str, config: dict[str, object] | None = None, name: str = "m") -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    save_file({"fc.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("[]" if file.endswith("modules.json") else "{}")
    return folder


def beside(out: Path) -> set[str]:
    """The side files of a result."""
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return names - {"model.safetensors", "shardmerge.json", "config.json"}


def mapping(folder: Path, files: str = "") -> Path:
    path = folder.parent / "m.yaml"
    lines = ["shardmerge: 1", f"sources: {{m: {folder}}}", "target: {name: hf/model, text: m}"]
    lines += [f"output: {{path: out, files: {files}}}" if files else "output: out", 'tensors: {"{r...}": "m:{r...}"}']
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("way", ["convert", "cast", "hf/model"])
def test_all_of_the_model_comes_along_and_nothing_of_the_run(way: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *OF_THE_MODEL, *OF_THE_RUN, config={"model_type": "x"})
    dtype = sm.Options(dtype="bfloat16") if way == "cast" else None
    result = sm.run(mapping(folder)) if way == "hf/model" else sm.convert(folder, tmp_path / "out", options=dtype)
    assert beside(tmp_path / "out") == set(OF_THE_MODEL)
    behind = dict(result.plan.left_behind)
    texts = [name for name in OF_THE_RUN if "/" not in name and not name.endswith((".bin", ".pth", ".pt", ".gguf"))]
    assert set(texts) <= set(behind)
    assert sm.verify(tmp_path / "out")


def test_the_plan_lists_both(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen.tiktoken", "trainer_state.json", config={})
    text = shardmerge("convert", folder, tmp_path / "out", "--dry-run").stdout
    assert "qwen.tiktoken" in text.split("files left behind:")[0]
    assert "trainer_state.json: the training run's record" in text
    value = json.loads(shardmerge("convert", folder, tmp_path / "out", "--dry-run", "--json").stdout)
    assert value["left_behind"] == {"trainer_state.json": "the training run's record"}


def test_a_directory_of_work_is_no_model(tmp_path: Path) -> None:
    """A .pth among scripts: only files of known names go with it."""
    folder = folder_of(tmp_path, "train.py", "notes.txt", "data.json", "tokenizer.json", "qwen.tiktoken")
    sm.convert(folder / "model.safetensors", tmp_path / "out")
    assert beside(tmp_path / "out") == {"tokenizer.json", "qwen.tiktoken"}


@pytest.mark.usefixtures("remote_code")
def test_a_model_with_its_own_code_loads(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    names = {"AutoConfig": "configuration_my.MyConfig", "AutoModel": "modeling_my.MyModel"}
    (folder / "configuration_my.py").write_text(
        textwrap.dedent("""
            from transformers import PretrainedConfig
            class MyConfig(PretrainedConfig):
                model_type = "my"
        """)
    )
    (folder / "modeling_my.py").write_text(
        textwrap.dedent("""
            import torch
            from transformers import PreTrainedModel
            from .configuration_my import MyConfig
            class MyModel(PreTrainedModel):
                config_class = MyConfig
                def __init__(self, config):
                    super().__init__(config)
                    self.fc = torch.nn.Linear(2, 2, bias=False)
                    self.post_init()
        """)
    )
    save_file({"fc.weight": torch.full((2, 2), 3.0)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "my", "auto_map": names}))
    assert sm.convert(folder, tmp_path / "out", options=sm.Options(dtype="bfloat16")).plan.warnings == ()
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded.fc.weight.float(), torch.full((2, 2), 3.0))


@pytest.mark.parametrize(
    ("file", "content", "missing"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_gone.M"}}, "modeling_gone.py"),
        ("config.json", {"custom_pipelines": {"p": {"impl": "pipe.P"}}}, "pipe.py"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}, "tokenization_x.py"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "image_gone.P"}}, "image_gone.py"),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}, "vocabulary"),
        ("modules.json", [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}], "1_Pooling"),
    ],
)  # fmt: skip
def test_what_a_file_names_and_is_not_there_is_a_warning(
    file: str, content: object, missing: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, config={"model_type": "x"})
    (folder / file).write_text(json.dumps(content))
    warnings = sm.convert(folder, tmp_path / "out").plan.warnings
    assert any(file in warning and missing in warning for warning in warnings), warnings


def test_code_that_imports_what_is_not_there(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "vision.py", "parts/__init__.py", config={"auto_map": {"AutoModel": "modeling_x.M"}})
    code = "from .vision import A\nfrom .parts.deep import B\nfrom .audio import C\ntry:\n    from .fast import D\n"
    (folder / "modeling_x.py").write_text(code)
    (warning,) = sm.convert(folder, tmp_path / "out").plan.warnings
    assert "modeling_x.py names audio.py" in warning


def test_code_of_another_repository_is_not_missing(tmp_path: Path) -> None:
    names = {"AutoModel": "org/name--modeling_x.M"}
    assert sm.convert(folder_of(tmp_path, config={"auto_map": names}), tmp_path / "out").plan.warnings == ()


def test_weights_of_further_modules_are_missed_aloud(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "2_Dense/config.json", config={})
    save_file({"linear.weight": torch.ones(2, 2)}, folder / "2_Dense" / "model.safetensors")
    assert "2_Dense" in sm.convert(folder, tmp_path / "out").plan.warnings[0]


# --- files: ---


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("model", {"tokenizer.json", "a.txt"}),
        ("none", set()),
        ("all", {"tokenizer.json", "a.txt", "trainer_state.json"}),
        ("{include: [trainer_*]}", {"tokenizer.json", "a.txt", "trainer_state.json"}),
        ("{exclude: [a.*]}", {"tokenizer.json"}),
        ("{include: [trainer_*], exclude: ['*.txt', token*]}", {"trainer_state.json"}),
    ],
)
def test_the_user_chooses(files: str, expected: set[str], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "tokenizer.json", "a.txt", "trainer_state.json", config={"model_type": "x"})
    plan = sm.run(mapping(folder, files)).plan
    assert beside(tmp_path / "out") == expected
    assert {name for name, _ in plan.left_behind} == {"tokenizer.json", "a.txt", "trainer_state.json"} - expected
    if files in ("model", "none", "all"):
        shutil.rmtree(tmp_path / "out")
        shardmerge("convert", folder, tmp_path / "out", "--files", files)
        assert beside(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ("some", "unknown-files"),
        ("{inclde: [a]}", "unknown-key"),
        ("{include: a}", "wrong-kind"),
        ("{include: [nothing*]}", "file-matches-nothing"),
        ("{exclude: ['*.json']}", "needed-file"),
    ],
)
def test_choices_without_effect_or_sense(files: str, code: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "tokenizer.json", config={"model_type": "x"})
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.plan(mapping(folder, files))
    assert [error.code for error in caught.value.each()] == [code]


def test_a_mapping_without_a_target_has_no_files(tmp_path: Path) -> None:
    path = mapping(folder_of(tmp_path, config={}), "all")
    path.write_text(path.read_text().replace("target: {name: hf/model, text: m}\n", ""))
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.plan(path)
    assert caught.value.code == "no-target"


@pytest.mark.parametrize("name", [*OF_THE_MODEL, "deepseek.py", "anything.yaml", "pooling.json"])
def test_names_of_a_model(name: str) -> None:
    assert comes_along(name, model_folder=True)


@pytest.mark.parametrize(
    "name", ["rng_state_0.pth", "random_states_1.pkl", "optimizer_2.bin", "distrib_optim.pt", "scheduler.pt",
             "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "scaler.pt", "optim_world_size_4_rank_3.pt",
             "dist_sampler.bin", "sampler_1.bin", "training_args.bin", "custom_checkpoint_0.pkl", "data.pt",
             "recipe_state.pt"]
)  # fmt: skip
def test_names_of_state(name: str) -> None:
    assert training_state(name)


@pytest.mark.parametrize(
    "name", ["data_model.bin", "prompt_optimizer_model.pt", "random_forest.pt", "model.pt", "m.bin"]
)
def test_names_that_only_look_like_state(name: str) -> None:
    assert not training_state(name)


@pytest.mark.parametrize("name", ["optimizer.bin", "sampler.bin", "model.h5", "a.tmp", "eval_results.json", ".hidden"])
def test_names_of_a_run(name: str) -> None:
    assert left_behind(name)


# --- links ---


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text("root:x:0:0")
    return path


@pytest.mark.parametrize("name", ["vocab.txt", "modeling_x.py", "additional_chat_templates/a.jinja"])
def test_a_side_file_that_leads_outside(name: str, secret: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config={"model_type": "x"})
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(folder, tmp_path / "out")
    assert caught.value.code == "link-outside"
    assert str(folder / name) in caught.value.where
    (folder / name).unlink()
    shutil.copy(secret, folder / name)  # as the hint says
    sm.convert(folder, tmp_path / "out")
    assert name in beside(tmp_path / "out")


def test_a_folder_that_leads_outside(secret: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config={"model_type": "x"})
    (folder / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(folder, tmp_path / "out")
    assert "link-outside" in {error.code for error in caught.value.each()}


def test_a_log_that_leads_outside_is_nobody_s_business(secret: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config={})
    (folder / "train.log").symlink_to(secret)
    sm.convert(folder, tmp_path / "out")
    assert beside(tmp_path / "out") == set()


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_lead_outside(tmp_path: Path, *, sharded: bool) -> None:
    folder = folder_of(tmp_path, config={})
    name = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / name).symlink_to(tmp_path / "elsewhere.safetensors")
    if sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(folder, tmp_path / "out")
    assert caught.value.code == "link-outside"
    command = caught.value.hint.split(": ", 1)[1].split(";")[0]
    assert os.system(command) == 0  # the command of the hint, as it stands
    sm.convert(folder, tmp_path / "out")


def test_links_inside_and_the_directory_itself_are_followed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "tokenizer.json", config={})
    (folder / "vocab.json").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "weights.safetensors").symlink_to(folder / "model.safetensors")
    sm.convert(tmp_path / "link", tmp_path / "out")
    assert beside(tmp_path / "out") == {"tokenizer.json", "vocab.json"}
    sm.convert(tmp_path / "weights.safetensors", tmp_path / "out2")


def test_the_hub_cache_and_nothing_that_looks_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    files = folder_of(tmp_path, "tokenizer.json", config={"model_type": "x"})
    for number, path in enumerate(sorted(files.iterdir())):
        shutil.copy(path, repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    sm.convert(snapshot, tmp_path / "out")
    assert beside(tmp_path / "out") == {"tokenizer.json"}
    (snapshot / "vocab.txt").symlink_to(secret)
    (repo / "blobs" / "9").symlink_to(secret)
    (snapshot / "merges.txt").symlink_to("../../blobs/9")
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(snapshot, tmp_path / "out2")
    assert [Path(error.where).name for error in caught.value.each()] == ["merges.txt", "vocab.txt"]
