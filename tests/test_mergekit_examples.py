"""The example files of mergekit become the weights that mergekit 0.1.5 makes, run beside ours on the same models.

The models (``mergekit_models.py``) are as deep as those that the examples name, and a few values wide. mergekit runs
each example twice: as it is, and in float64 with the type of the result unchanged. In the type of the models it rounds
after every step, and so is several roundings away from what it means; ours computes in float32 and rounds once, and is
held to its float64.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import shardmerge
from shardmerge import api
from tests.load_environments import MERGEKIT, interpreter, ready
from tests.mergekit_models import THINKING, write_models

ROOT = Path(__file__).parent.parent
EXAMPLES = Path(__file__).parent / "mergekit_examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yml"))
Tensors = dict[str, torch.Tensor]
# What a type rounds to, relative to the number.
STEPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# mergekit's table of a Qwen2.5-VL says that there are two of each of these, and makes them twice: the second time as
# the last layer of a gradient. Where it has no table it goes by the numbers in the names, as is done here.
TWICE = {"vlm-ties": re.compile(r"visual\.merger\.mlp\.[02]\.(weight|bias)")}
# float32 operations one behind the other, each of which rounds a term.
CHAIN = 16 * 2.0**-24


@dataclass(frozen=True)
class Example:
    """An example in a folder where its models lie."""

    name: str
    place: Path

    @cached_property
    def config(self) -> str:
        """Its text, with paths for models."""
        return (self.place / f"{self.name}.yml").read_text("utf-8")

    def theirs(self, kind: str = "") -> Tensors:
        """What mergekit made, as it is or ``-wide``."""
        return tensors(self.place / "out" / f"{self.name}{kind}")

    @cached_property
    def ours(self) -> Tensors:
        """What we make of it."""
        return tensors(self.out)

    @cached_property
    def out(self) -> Path:
        """Where our result is."""
        mapping = self.place / f"{self.name}.yaml"
        text = api.init(self.place / f"{self.name}.yml", mapping=mapping).text
        mapping.write_text(text.replace("out/merged", f"ours/{self.name}"), "utf-8")
        return shardmerge.run(mapping, options=shardmerge.Options(sync=False)).path

    def deltas(self) -> Iterator[Tensors]:
        """Yields what each model of the last document differs from its base by, in float64."""
        last = self.config.rpartition("---\n")[2]
        (base,) = re.findall(r"^base_model: (\S+)$", last, re.MULTILINE)
        for model in re.findall(r"- \{?model: ([^\s,}]+)", last):
            own = self.models(model)
            yield {name: own[name].double() - value.double() for name, value in self.models(base).items()}

    def models(self, model: str) -> Tensors:
        """Returns a model, or what mergekit made of an earlier document."""
        between = self.place / "out" / f"{self.name}-wide-between" / model
        return tensors(between if between.is_dir() else self.place / model)


def tensors(folder: Path) -> Tensors:
    """Returns all tensors of a directory."""
    found: Tensors = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def in_float64(config: str) -> str:
    """Returns a configuration that computes in float64, and writes what it wrote before."""
    documents = []
    for one in config.split("---\n"):
        stated = re.search(r"^dtype: (\w+)\n", one, re.MULTILINE)
        out = stated[1] if stated else ("float32" if "tokenizer" in one else "bfloat16")  # what the models have
        documents.append(f"dtype: float64\nout_dtype: {out}\n" + one.replace(stated[0] if stated else "", ""))
    return "---\n".join(documents)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, the examples with paths in them, and all that mergekit makes of them."""
    if not ready(MERGEKIT, "mergekit"):
        pytest.skip(f"mergekit {MERGEKIT} could not be installed: `python tests/load_environments.py` says why")
    folder = tmp_path_factory.mktemp("examples")
    write_models(folder / "models")
    models = [path.parent.relative_to(folder / "models").as_posix() for path in folder.rglob("config.json")]
    known = re.compile(rf"(?<![\w/-])({'|'.join(map(re.escape, models))})(?![\w.-])")
    pairs = []
    for name in NAMES:
        text = known.sub(r"models/\1", (EXAMPLES / f"{name}.yml").read_text("utf-8"))
        for kind, config in (("", text), ("-wide", in_float64(text))):
            (folder / f"{name}{kind}.yml").write_text(config, "utf-8")
            pairs += [f"{name}{kind}.yml", f"out/{name}{kind}"]
    script = Path(__file__).with_name("run_mergekit.py")
    done = subprocess.run(
        [interpreter(MERGEKIT, "mergekit"), script, *pairs], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def example(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    """The example that the test names; its paths are relative to the current folder."""
    monkeypatch.chdir(place)
    found = Example(request.param, place)
    for kind in ("", "-wide"):
        assert found.theirs(kind), (place / "out" / f"{found.name}{kind}.error").read_text("utf-8")
    return found


def beyond(example: Example) -> tuple[dict[str, torch.Tensor], float]:
    """Returns which elements are not those of mergekit in float64 but for one rounding, and their share of all."""
    wanted, found = example.theirs("-wide"), {}
    assert example.ours.keys() == wanted.keys()
    twice = TWICE.get(example.name, re.compile("-"))
    for name, tensor in ((name, tensor) for name, tensor in wanted.items() if not twice.fullmatch(name)):
        assert example.ours[name].dtype == tensor.dtype, name
        wide = tensor.double()
        near = 2 * STEPS[tensor.dtype] * wide.abs() + CHAIN * max(float(wide.abs().max()), 0.2)
        found[name] = (example.ours[name].double() - wide).abs() > near
    return found, sum(map(torch.sum, found.values())).item() / sum(one.numel() for one in found.values())


def same_bytes(example: Example) -> None:
    """The tensors of mergekit, bit for bit."""
    wanted = example.theirs()
    assert example.ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(example.ours[name], tensor), name


def one_rounding(example: Example) -> None:
    """Those of mergekit in float64, but for one rounding."""
    assert beyond(example)[1] == 0


def but_for_ties(example: Example) -> None:
    """The same, where no two elements of a difference have the same magnitude: of equals, either may be kept."""
    found, share = beyond(example)
    assert share < 0.003
    deltas = list(example.deltas())
    for name, where in found.items():
        tied = sum(shared(delta[name].abs()) for delta in deltas)
        assert not (where & (tied == 0)).any(), name
    print(f"{example.name}: {share:.3%} of the elements are ties that were decided otherwise")


def shared(sizes: torch.Tensor) -> torch.Tensor:
    """Returns 1 where another element is as large."""
    _, places, counts = sizes.unique(return_inverse=True, return_counts=True)
    return (counts[places] > 1).int()


def same_law(example: Example) -> None:
    """Others are kept at random, as many and as large."""
    kept, sizes = [], []
    base = example.models("models/mistralai/Mistral-7B-v0.1")
    for made in (example.ours, example.theirs("-wide")):
        assert made.keys() == base.keys()
        changes = torch.cat([(made[name].double() - base[name].double()).flatten() for name in base])
        kept.append(float((changes != 0).double().mean()))
        sizes.append(float(changes.abs().mean()))
    assert abs(kept[0] - kept[1]) < 0.01
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


# What is shown of each, in the words of docs/guides/merging.md.
SHOWN: dict[str, Callable[[Example], None]] = {
    "the same bytes": same_bytes,
    "one rounding": one_rounding,
    "one rounding, and ties": but_for_ties,
    "the same law": same_law,
}
ROW = re.compile(r"^\| `([\w-]+)\.yml` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
TABLE = {
    name: (method, shown) for name, method, shown in ROW.findall((ROOT / "docs/guides/merging.md").read_text("utf-8"))
}


def test_the_guide_lists_every_example() -> None:
    methods = {name: re.findall(r"^merge_method: (\w+)$", (EXAMPLES / f"{name}.yml").read_text("utf-8"), re.MULTILINE)
               for name in NAMES}  # fmt: skip
    assert {name: method for name, (method, _) in TABLE.items()} == {
        name: ", ".join(f"`{one}`" for one in found) for name, found in methods.items()
    }


@pytest.mark.parametrize("example", NAMES, indirect=True)
def test_an_example_of_mergekit_makes_its_weights(example: Example) -> None:
    SHOWN[TABLE[example.name][1]](example)


TEMPLATED = [name for name in NAMES if "chat_template" in (EXAMPLES / f"{name}.yml").read_text("utf-8")]


@pytest.mark.parametrize("example", TEMPLATED, indirect=True)
def test_the_chat_template_of_most_models_is_taken(example: Example) -> None:
    """Of the two models, which the base of two of the examples does not have."""
    folders = (example.out, example.place / "out" / example.name)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder).chat_template for folder in folders)
    assert ours == theirs == THINKING
