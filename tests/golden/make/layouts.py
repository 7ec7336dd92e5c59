"""What the make_layouts_*.py scripts share: random weights, writing a case, and comparing two models.

A case is OUT/<name>/ with
    source/    the checkpoint as the tool itself has it on disk
    truth/     model.safetensors + config.json: what the real conversion makes of it
    case.json  the tool, its versions, the function that converted, the directions it knows, and what was checked
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import pathlib
import shutil
import sys
import types
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, LAYERS, VOCAB = 32, 2, 112


def versions(*packages: str) -> dict[str, str]:
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"torch": torch.__version__.split("+")[0], **found}


def generator(name: str) -> torch.Generator:
    """A generator of its own for every name, so that no two tensors are equal."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def random_tensor(name: str, shape: Iterable[int], dtype: torch.dtype, norm: bool = False) -> torch.Tensor:
    shape = tuple(shape)
    values = torch.randn(shape, generator=generator(name), dtype=torch.float32)
    scale = 0.1 if len(shape) < 2 else shape[-1] ** -0.5
    return ((1.0 if norm else 0.0) + scale * values).to(dtype)


def is_norm(name: str) -> bool:
    """Whether a tensor is the gain of a normalization, which should be near one."""
    stem, _, leaf = name.rpartition(".")
    last = stem.rpartition(".")[2]
    words = ("norm", "layrnorm", "ln_", "lambda", "ls1", "ls2")
    return leaf in ("weight", "scale") and any(word in last for word in words)


@torch.no_grad()
def randomize(model: torch.nn.Module, salt: str) -> None:
    """Give every parameter random values of its own; tied ones get one value."""
    for name, parameter in model.named_parameters():
        parameter.copy_(random_tensor(f"{salt}/{name}", parameter.shape, parameter.dtype, is_norm(name)))


def fresh(out: str | pathlib.Path, name: str) -> pathlib.Path:
    """An empty case folder with source/ and truth/."""
    case = pathlib.Path(out) / name
    shutil.rmtree(case, ignore_errors=True)
    (case / "source").mkdir(parents=True)
    (case / "truth").mkdir()
    return case


def contiguous(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def write_truth(case: pathlib.Path, state: Mapping[str, torch.Tensor], config: Any) -> None:
    save_file(contiguous(state), case / "truth" / "model.safetensors", metadata={"format": "pt"})
    write_config(case / "truth", config)


def write_config(folder: pathlib.Path, config: Any) -> None:
    fields = config if isinstance(config, Mapping) else json.loads(config.to_json_string())
    fields = {name: value for name, value in fields.items() if name != "_name_or_path"}
    (folder / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")


def keep_only(folder: pathlib.Path, *names: str) -> None:
    for child in folder.iterdir():
        if child.name not in names:
            shutil.rmtree(child) if child.is_dir() else child.unlink()


def write_case(
    case: pathlib.Path,
    *,
    tool: str,
    made_with: Mapping[str, str],
    function: str,
    entry: str,
    forward: bool,
    backward: bool,
    checks: Mapping[str, Any],
    sizes: Mapping[str, Any],
    notes: Iterable[str] = (),
) -> None:
    """Write case.json; `forward` and `backward` tell which directions the tool itself knows."""
    kilobytes = sum(path.stat().st_size for path in case.rglob("*") if path.is_file()) / 1024
    fields = {
        "name": case.name,
        "tool": tool,
        "versions": dict(made_with),
        "function": function,
        "entry": f"source/{entry}" if entry else "source",
        "truth": "truth/model.safetensors",
        "tensors_in_truth": len(load_file(case / "truth" / "model.safetensors")),
        "directions": {"source_to_truth": forward, "truth_to_source": backward},
        "checks": dict(checks),
        "sizes": dict(sizes),
        "notes": list(notes),
    }
    (case / "case.json").write_text(json.dumps(fields, indent=1) + "\n")
    print(f"{case.name}: {kilobytes:.0f} KB, {fields['tensors_in_truth']} tensors, {dict(checks)}")


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """Fail unless both have the same names and, bit for bit, the same tensors."""
    if left.keys() != right.keys():
        raise SystemExit(f"names differ: {sorted(left.keys() ^ right.keys())}")
    for name, tensor in left.items():
        other = right[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape or not torch.equal(tensor, other):
            raise SystemExit(f"{name} differs")


def all_distinct(state: Mapping[str, torch.Tensor]) -> None:
    """Fail if two tensors of one shape are equal: a swap of them would go unseen."""
    seen: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, tensor in state.items():
        key = tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if key in seen:
            raise SystemExit(f"{name} equals {seen[key]}")
        seen[key] = name


def largest_difference(left: torch.Tensor, right: torch.Tensor, limit: float) -> float:
    """The largest absolute difference of two outputs; fails beyond `limit` or if the outputs are flat."""
    found = (left.float() - right.float()).abs().max().item()
    if not found <= limit or left.float().std().item() < 1e-3:
        raise SystemExit(f"outputs differ by {found}, spread {left.float().std().item()}")
    return float(f"{found:.3g}")


class StandIns:
    """Finds a package that cannot be imported here and is imported, but never called, by the tool."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self.package and not name.startswith(self.package + "."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: make_class(name)  # type: ignore[method-assign]
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def make_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return AnyAttribute(name, (torch.nn.Module,), {})


class AnyAttribute(type):
    """A class with whatever class attribute an import asks for (InterpolationMode.BICUBIC)."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


def stand_in(package: str) -> None:
    """Empty modules and classes for `package` and all below it; call it before the tool is imported."""
    sys.meta_path.insert(0, StandIns(package))
