"""The documentation is true of the code: examples run, and codes, commands, options and files it names exist."""

from __future__ import annotations

import ast
import functools
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

import shardmerge
from shardmerge.cli.main import cli
from shardmerge.mapping.preset_files import load_preset, with_preset
from shardmerge.mapping.reader import load_spec
from shardmerge.tensors import leaves

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
# The pages of benchmarks are written by `make bench`.
PAGES = sorted(path for path in DOCS.rglob("*.md") if not path.name.startswith("benchmarks"))
COMMANDS_PAGE = DOCS / "reference" / "commands.md"


def identify(path: Path) -> str:
    return str(path.relative_to(DOCS))


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yields every command that does something, by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(cli))


def options(command: click.Command) -> set[str]:
    found = {text for parameter in command.params if isinstance(parameter, click.Option) for text in parameter.opts}
    return found | {"-h", "--help"}


# Options of other programs that pages mention.
FOREIGN = {"--save-format", "--flips"}
ALL_OPTIONS = options(cli).union(FOREIGN, *(options(command) for command in COMMANDS.values()))


# --- the examples ---


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.yaml"))) >= 5
    assert len(list(EXAMPLES.glob("*.py"))) >= 5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_mappings_are_mappings(path: Path) -> None:
    spec = load_spec(path)
    if spec.use:
        spec = with_preset(spec, load_preset(spec.use))
    assert spec.rules or (spec.target and spec.target.name == "hf/names")  # its rules come with the source
    assert spec.output is not None


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints that the examples name, and the examples, in a directory of their own."""
    torch.manual_seed(0)
    state = {"module.embed.weight": torch.randn(8, 4), "module.step": torch.tensor(7)}
    for layer in range(2):
        state[f"module.blocks.{layer}.attn.weight"] = torch.randn(4, 4)
        state[f"module.blocks.{layer}.attn.bias"] = torch.randn(4)
    state["module.head.weight"] = torch.randn(8, 4)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoints" / "last.pth")
    save_file({"head.weight": torch.randn(2, 4)}, tmp_path / "checkpoints" / "head.safetensors")
    base = {"encoder.weight": torch.randn(4, 4), "encoder.bias": torch.randn(4), "head.weight": torch.randn(2, 4)}
    (tmp_path / "models" / "base").mkdir(parents=True)
    save_file(base, tmp_path / "models" / "base" / "model.safetensors")
    for path in EXAMPLES.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rename(tree: Path) -> None:
    plan = shardmerge.plan(tree / "rename.yaml")
    result = shardmerge.run(tree / "rename.yaml")
    made = load_file(result.path / "model.safetensors")
    before = torch.load(tree / "checkpoints" / "last.pth", weights_only=True)["model"]
    assert result.path == tree / "out" / "renamed"
    assert result.plan.id == plan.id
    assert [unused.name for unused in plan.unused] == ["module.step"]
    assert sorted(made) == [
        "embeddings.weight",
        "head.weight",
        "layers.0.attn.bias",
        "layers.0.attn.weight",
        "layers.1.attn.bias",
        "layers.1.attn.weight",
    ]
    assert np.array_equal(made["layers.1.attn.bias"], before["module.blocks.1.attn.bias"].numpy())


def test_two_sources(tree: Path) -> None:
    plan = shardmerge.plan(tree / "two-sources.yaml")
    result = shardmerge.run(tree / "two-sources.yaml")
    made = shardmerge.open_checkpoint(result.path)
    head = shardmerge.open_checkpoint(tree / "checkpoints" / "head.safetensors")["head.weight"]
    base = shardmerge.open_checkpoint(tree / "models" / "base")["encoder.weight"]
    assert {tensor.name: next(leaves(tensor.entry)).source for tensor in plan.tensors()} == {
        "encoder.bias": "base",
        "encoder.weight": "base",
        "head.weight": "trained",
    }
    assert torch.equal(made["head.weight"].torch(), head.torch().bfloat16())
    assert torch.equal(made["encoder.weight"].torch(), base.torch().bfloat16())


def test_the_16_bit_view(tree: Path, golden: Path) -> None:
    shutil.copytree(golden / "zero" / "llama_z2_w2_bf16" / "ckpt", tree / "checkpoint-500")
    result = shardmerge.run(tree / "zero-module-view.yaml")
    assert {tensor.dtype.name for tensor in shardmerge.open_checkpoint(result.path).values()} == {"BF16"}


@pytest.mark.parametrize("name", ["xtuner-llava.yaml", "own-rules.yaml"])
def test_llava(name: str, tree: Path, golden: Path) -> None:
    xtuner = golden / "xtuner"
    trained = shardmerge.open_checkpoint(xtuner / "frozen_z2" / "work_dirs" / "iter_2.pth")
    own = {key.replace("projector.model.", "mm_projector."): tensor.torch() for key, tensor in trained.items()}
    (tree / "work_dirs" / "own").mkdir(parents=True)
    torch.save({"state_dict": own | {"ema.decay": torch.zeros(1)}}, tree / "work_dirs" / "own" / "iter_100.pth")
    shutil.copytree(xtuner / "frozen_z2" / "work_dirs" / "iter_2.pth", tree / "work_dirs" / "llava" / "iter_5198.pth")
    shutil.copytree(xtuner / "base_llm", tree / "models" / "Meta-Llama-3-8B-Instruct")
    shutil.copytree(xtuner / "base_clip", tree / "models" / "clip-vit-large-patch14-336")
    sources = {tensor.name: next(leaves(tensor.entry)).source for tensor in shardmerge.plan(tree / name).tensors()}
    assert sources["multi_modal_projector.linear_1.weight"] == "trained"
    assert sources["vision_tower.vision_model.post_layernorm.weight"] == "vision"


def test_the_code_that_the_docs_show_for_a_typing_error(tree: Path) -> None:
    text = (tree / "rename.yaml").read_text("utf-8").replace("module.head", "module.haed")
    (tree / "rename.yaml").write_text(text, "utf-8")
    with pytest.raises(shardmerge.ShardmergeError) as raised:
        shardmerge.plan("rename.yaml")
    shown = (DOCS / "reference" / "mapping.md").read_text("utf-8")
    for error in raised.value.each():
        assert error.what in shown
        assert f"[{error.code}]" in shown
        assert error.where in shown


# The arguments of each Python example, and a line of what it prints.
PYTHON = {
    "look_inside.py": (["checkpoints/last.pth"], "torch zip 7 tensors"),
    "read_rows.py": (["checkpoints/last.pth"], "module.embed.weight float32 (2, 4)"),
    "views.py": (["models/base"], "encoder.weight is mapped (4, 4) writeable: False\nas in the file: True\n"),
    "walk.py": (["models/base"], "encoder.weight largest "),
    "convert_and_verify.py": (
        ["checkpoints/last.pth", "out/converted"],
        "ok: safetensors reads the same tensors",
    ),
    "plan_elsewhere.py": (["rename.yaml", "models", "moved"], "same plan: True\npublished: out 1 file\n"),
    "merge_in_memory.py": (["two-sources.yaml"], "head.weight torch.bfloat16 (2, 4) <- trained:head.weight"),
    "tour.py": (
        ["two-sources.yaml", "models/base", "out/tour"],
        "after a cast: 0 differences\nreport: tour.report.html\nattested: tour.intoto.json 1 files of weights\n",
    ),
    "load_sharded.py": (["models/base"], "tensors, of which encoder.bias sums to"),
    "catch_errors.py": (["checkpoints/last.pth"], "readable: torch zip"),
}


def test_every_python_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PYTHON, "load_model.py"}  # tests/test_feeds.py runs it


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # said where there is one process
@pytest.mark.parametrize("name", PYTHON)
def test_python_examples_run(
    name: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, printed = PYTHON[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert printed in capsys.readouterr().out


def test_errors_end_with_their_code(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["catch_errors.py", "checkpiont"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "catch_errors.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().out == "missing-path | no such file or directory | did you mean `checkpoints`?\n"


def _numberless(line: str) -> str:
    return re.sub(r"equal to .*", "equal to PATH", re.sub(r"[\d,.]*\d", "N", line))


def test_what_the_pages_show_of_verify_is_what_it_prints(
    tree: Path, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(golden / "zero" / "llama_z2_w2_bf16" / "ckpt", tree / "checkpoint-500")
    result = shardmerge.run(tree / "zero-module-view.yaml")
    cli(["verify", str(result.path), "--sources", "zero-module-view.yaml", "--reference", str(result.path)],
        standalone_mode=False)  # fmt: skip
    printed = {_numberless(line) for line in capsys.readouterr().out.splitlines()}
    printed.add("ok  transformers N loads LlavaForConditionalGeneration: N missing, unexpected, mismatched")
    shown = [line for page in PAGES for line in page.read_text("utf-8").splitlines() if line.startswith("ok  ")]
    assert len(shown) > 10
    assert {_numberless(line) for line in shown} <= printed


# --- what the pages name ---


@functools.cache
def words_of_the_source() -> set[str]:
    """Every string literal of the package; error codes are among them."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "shardmerge").rglob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_every_code_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    kebab = r"[a-z0-9]+(?:-[a-z0-9]+)+"
    named = set(re.findall(rf"(?<!`)`({kebab})`(?!`)", text)) | set(re.findall(rf"\[({kebab})\]\n", text))
    assert named <= words_of_the_source() | set(COMMANDS) | {"checkpoint-500"}


def sections() -> dict[str, str]:
    """The sections of the commands page, by heading."""
    parts = re.split(r"^## (.*)$", COMMANDS_PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named_options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*(?![\w-])", " ".join(re.findall(r"`([^`]*)`", text))))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_page_is_complete(name: str) -> None:
    command = COMMANDS[name]
    own = sections()[f"shardmerge {name.split(maxsplit=1)[0]}"]
    named = named_options(own)
    if "the options of everything that plans" in own:
        named |= named_options(sections()["Options of everything that plans"])
    assert f"`shardmerge {name}" in own
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            assert parameter.name is not None
            assert re.search(rf"`shardmerge {name}[^`]*\b{parameter.name.upper()}\b", own)
    assert options(command) - {"-h", "--help"} <= named


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in COMMANDS}))
def test_the_commands_page_names_no_other_options(name: str) -> None:
    known = set().union(*(options(command) for full, command in COMMANDS.items() if full.split()[0] == name))
    assert named_options(sections()[f"shardmerge {name}"]) <= known


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_options_and_commands_of_all_pages(page: Path) -> None:
    text = page.read_text("utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert {option for option in named_options(prose) if option.startswith("--")} <= ALL_OPTIONS
    for line in re.findall(r"^\$ shardmerge (.*)$", text, flags=re.MULTILINE):
        words = line.split("#")[0].split()
        name = " ".join(words[:2]) if words[0] == "presets" else words[0]
        assert name in COMMANDS, line
        assert {word for word in words if word.startswith("-")} <= options(COMMANDS[name]), line


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_files_that_pages_name_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"<!-- file: (\S+) -->", text):
        assert (DOCS / name).is_file() or (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).is_file(), link


def test_every_error_class_is_listed_with_its_exit_code() -> None:
    page = (DOCS / "reference" / "python.md").read_text("utf-8")
    classes = [value for value in vars(shardmerge).values() if isinstance(value, type)]
    for error in classes:
        if issubclass(error, shardmerge.ShardmergeError) and error not in (
            shardmerge.ShardmergeError,
            shardmerge.Problems,
        ):
            assert f"| `{error.__name__}` | {error.exit_code} |" in page


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "python.md").read_text("utf-8")
    for name in shardmerge.__all__:
        if name != "__version__":
            assert re.search(rf"\.{name}$|`{name}`", page, flags=re.MULTILINE), name


def test_every_public_name_is_in_an_example_that_runs() -> None:
    texts = [(EXAMPLES / name).read_text("utf-8") for name in PYTHON]
    used = {name for text in texts for name in re.findall(r"\bshardmerge\.(\w+)", text)}
    assert set(shardmerge.__all__) <= used
