"""What each command imports: the clock of start-up, as sets that do not flake.

A module that creeps in costs every start: 0.3 s of 0.4 s were imports that the command at hand had no use for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.harness import measure, succeed

merges = pytest.importorskip("benchmarks.merges", reason="torch writes the checkpoints")
synthetic = pytest.importorskip("benchmarks.synthetic", reason="torch writes the checkpoints")

# Runs the command line as `python -m shardmerge` does; the last line of stdout are the modules that it imported.
DRIVER = """
import json, sys
before = set(sys.modules)
from shardmerge.cli.main import main
try:
    main()
except SystemExit as done:
    print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
    sys.exit(done.code)
"""

# Everything that is not the standard library's, by top-level name.
LIBRARIES = {
    "click", "numpy", "ml_dtypes", "yaml", "rich", "tqdm", "safetensors", "threadpoolctl", "torch", "transformers",
    "huggingface_hub",
}  # fmt: skip
# Of the standard library what is slow to import and easily avoided. `inspect` and `ast` come with dataclasses and
# click, `pickle` and `ctypes` with numpy.
HEAVY = {
    "asyncio", "concurrent", "ctypes", "difflib", "email", "http", "importlib.metadata", "importlib.resources", "lzma",
    "multiprocessing", "pickle", "shlex", "shutil", "socket", "ssl", "subprocess", "tempfile", "unittest",
    "urllib.request", "xml", "zipfile",
}  # fmt: skip
OF_NUMPY = {"ctypes", "pickle"}
OF_CLICK = {"lzma", "shutil"}  # asks for the width of the terminal, for help alone
# Rooms of shardmerge that are a large part of its own start-up.
ROOMS = {
    "shardmerge.execute.engine", "shardmerge.execute.gpu", "shardmerge.execute.making", "shardmerge.execute.regions",
    "shardmerge.adapters.merging", "shardmerge.recognition.proposal", "shardmerge.inverse.inversion",
    "shardmerge.mapping.node_reader", "shardmerge.mapping.preset_files", "shardmerge.mapping.reader",
    "shardmerge.mapping.resolve",
    "shardmerge.ops.registry", "shardmerge.plan.identity", "shardmerge.plan.planner", "shardmerge.plan.reading",
    "shardmerge.plan.schedule", "shardmerge.plan.writing", "shardmerge.publish.running", "shardmerge.publish.shares",
    "shardmerge.sources.opening",
    "shardmerge.targets.llava.bases", "shardmerge.targets.llava.hf",
    "shardmerge.targets.training_config", "shardmerge.publish.verify",
}  # fmt: skip
READING = {"shardmerge.sources.opening"}
# What reads formats, and is imported where its format was recognised.
READERS = {
    "shardmerge.sources.distributed_safetensors", "shardmerge.sources.deepspeed", "shardmerge.sources.megatron",
    "shardmerge.sources.pickle_machine",
    "shardmerge.sources.pickle_values", "shardmerge.sources.pickle_vm",
    "shardmerge.sources.rank_sets", "shardmerge.sources.torch_checkpoint", "shardmerge.sources.zero",
}  # fmt: skip
OF_ZERO = READERS - {
    "shardmerge.sources.distributed_safetensors", "shardmerge.sources.megatron", "shardmerge.sources.rank_sets"
}  # fmt: skip
PLANNING = READING | {"shardmerge.plan.identity", "shardmerge.plan.planner", "shardmerge.plan.schedule"}
EXECUTING = PLANNING | {"shardmerge.execute.engine", "shardmerge.publish.running"}

MAPPING = """\
shardmerge: 1
sources: {trained: zero}
output: {path: out, dtype: bfloat16}
tensors:
  "{rest...}": trained:{rest...}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ZeRO-2 checkpoint, the same as one safetensors file, and a mapping."""
    folder = tmp_path_factory.mktemp("imports")
    shapes = synthetic.LlamaShape(64, 2, 4, 2, 128, 256).tensors()
    synthetic.write_zero(folder / "zero", shapes, stage=2, world=2, fill=True)
    synthetic.write_safetensors(folder / "small.safetensors", shapes, fill=True)
    (folder / "mapping.yaml").write_text(MAPPING, "utf-8")
    return folder


def imported(*arguments: str | Path) -> set[str]:
    """Returns the modules that a command imports, in a process of its own that fails if the command does."""
    # Without `site`, which imports what happens to be installed; the path is ours.
    done = succeed(measure([sys.executable, "-S", "-c", DRIVER, *arguments], env={"PYTHONPATH": ":".join(sys.path)}))
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(found)


def check(found: set[str], *, libraries: set[str], heavy: set[str], rooms: set[str]) -> None:
    assert {name.partition(".")[0] for name in found} & LIBRARIES == libraries
    assert found & HEAVY == heavy
    assert found & ROOMS == rooms


def test_help(folder: Path) -> None:
    found = imported("--help")
    check(found, libraries={"click"}, heavy=OF_CLICK, rooms=set())
    ours = {name for name in found if name.startswith("shardmerge.")}
    commands = {
        "bench", "checkpoints", "cluster", "colour", "completing", "conversions", "errors", "examples", "failing",
        "main",
        "mappings", "options", "presets", "progress", "report", "stopping",
    }  # fmt: skip
    assert ours == {
        "shardmerge.cli",
        "shardmerge.errors",
        "shardmerge.signals",
        "shardmerge.system_errors",
        "shardmerge.version",
        *(f"shardmerge.cli.{c}" for c in commands),
    }


def test_help_of_a_command(folder: Path) -> None:
    check(imported("convert", "--help"), libraries={"click"}, heavy=OF_CLICK, rooms=set())


@pytest.mark.parametrize(("source", "readers"), [("small.safetensors", set()), ("zero", OF_ZERO)])
def test_inspect(folder: Path, source: str, readers: set[str]) -> None:
    found = imported("inspect", folder / source)
    check(found, libraries={"click"}, heavy=set(), rooms=READING)
    assert found & READERS == readers


def test_plan(folder: Path) -> None:
    rooms = PLANNING | {f"shardmerge.mapping.{room}" for room in ("node_reader", "reader")}  # one rule keeps every name
    found = imported("plan", folder / "mapping.yaml")
    check(found, libraries={"click", "yaml"}, heavy=set(), rooms=rooms)


def test_a_cast_needs_numpy(folder: Path) -> None:
    rooms = EXECUTING | {"shardmerge.execute.making"}
    found = imported("convert", folder / "zero", folder / "out", "--dtype", "bfloat16")
    check(found, libraries={"click", "numpy", "ml_dtypes"}, heavy=OF_NUMPY, rooms=rooms)


def test_bytes_that_stay_need_no_numpy(folder: Path) -> None:
    found = imported("convert", folder / "zero", folder / "same")
    check(found, libraries={"click"}, heavy={"ctypes"}, rooms=EXECUTING)  # mallopt, sync_file_range


def test_the_blas_is_looked_for_where_a_product_is_made(tmp_path: Path) -> None:
    shape = synthetic.LlamaShape(64, 1, 4, 2, 128, 256)
    mapping = merges.write_lora(tmp_path / "in", shape, 4, fill=True)
    libraries = {"click", "numpy", "ml_dtypes", "yaml"}
    assert not imported("plan", mapping) & {"threadpoolctl", "shardmerge.execute.products"}
    found = imported("run", mapping, "--out", tmp_path / "out")
    assert {name.partition(".")[0] for name in found} & LIBRARIES == libraries | {"threadpoolctl"}


def test_a_plan_is_carried_out_without_what_made_it(folder: Path) -> None:
    imported("plan", folder / "mapping.yaml", "--out", folder / "plan.json")
    rooms = EXECUTING | {"shardmerge.execute.making", "shardmerge.plan.reading", "shardmerge.plan.writing"}
    found = imported("run", folder / "plan.json", "--out", folder / "planned")
    check(found, libraries={"click", "numpy", "ml_dtypes"}, heavy=OF_NUMPY, rooms=rooms)


def test_a_target_is_imported_when_it_is_asked_for() -> None:
    program = (
        "import sys\n"
        "from shardmerge.targets.registry import TARGETS\n"
        "TARGETS['peft/adapter']\n"
        "assert 'shardmerge.targets.peft_adapter' in sys.modules\n"
        "assert not {'shardmerge.targets.llava.hf', 'shardmerge.targets.tokenizer'} & set(sys.modules)\n"
        "assert all(TARGETS[name].name == name for name in TARGETS)\n"
    )
    succeed(measure([sys.executable, "-c", program]))


def test_the_library_is_whole_whatever_was_imported_first() -> None:
    """``plan`` is a function and a package: one object is both, whoever imports it first."""
    program = (
        "import shardmerge, shardmerge.publish.verify, shardmerge.plan.value, shardmerge.plan.planner\n"
        "from shardmerge.plan.value import Plan\n"
        "assert callable(shardmerge.plan) and callable(shardmerge.verify) and shardmerge.Plan is Plan\n"
        "assert set(shardmerge.__all__) <= set(dir(shardmerge))\n"
        "for name in shardmerge.__all__: getattr(shardmerge, name)\n"
        "import shardmerge.api, sys\n"
        "assert shardmerge.plan.__wrapped__ is shardmerge.api.plan and shardmerge.plan.value.Plan is Plan\n"
        "assert shardmerge.plan is sys.modules['shardmerge.plan']\n"
    )
    succeed(measure([sys.executable, "-c", program]))
