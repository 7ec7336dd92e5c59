"""Checks first results against other tools: ``python -m tests.day.oracles JOBS RESULTS``.

A process of its own, as torch takes more memory than everything else of the day.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.conftest import GOLDEN
from tests.day.jobs import Job, read_jobs

_LAYER = re.compile(r"\.layers\.(\d+)\.")
Tensors = Mapping[str, torch.Tensor]
Expected = Iterator[tuple[str, torch.Tensor]]


class Lazy(Mapping[str, torch.Tensor]):
    """The tensors of all safetensors files of a folder, each read by safetensors itself when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt").__enter__()
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def written(job: Job, out: Path) -> Tensors:
    if job.form == "bin":
        return {
            name: tensor
            for path in sorted(out.glob("*.bin"))
            for name, tensor in torch.load(path, weights_only=True).items()
        }
    return of_dcp(out) if job.form == "dcp" else Lazy(out)


def of_dcp(folder: Path) -> Tensors:
    """Reads what torch's distributed checkpoint holds of the model, by torch."""
    with tempfile.TemporaryDirectory() as name:
        dcp_to_torch_save(folder, Path(name) / "all.pt")
        found = torch.load(Path(name) / "all.pt", weights_only=False)
    return found.get("model", found)


def folder_of(given: str) -> Path:
    return Path(given) if Path(given).is_dir() else Path(given).parent


def drawn(names: Iterable[str]) -> list[str]:
    """Leaves most layers of deep models out: reading 32 GB twice takes long."""
    return [name for name in names if (found := _LAYER.search(name)) is None or int(found[1]) in (0, 1, 15, 31)]


def as_is(job: Job) -> Expected:
    source = Lazy(folder_of(job.given))
    yield from ((name, source[name]) for name in drawn(source))


def cast(job: Job) -> Expected:
    """A checkpoint that is cast: given by the command line, or the one beside a mapping."""
    source, dtype = (Path(job.given), torch.bfloat16) if job.dtype else (Path(job.given).parent / "base", torch.float16)
    tensors = Lazy(source)
    yield from ((name, tensors[name].to(dtype)) for name in drawn(tensors))


def golden(job: Job, which: str) -> Expected:
    """What DeepSpeed, or torch, made of a golden checkpoint."""
    for name, tensor in load_file(GOLDEN / which / "truth.safetensors").items():
        yield name, tensor.to(torch.bfloat16) if job.dtype else tensor


def zero3(job: Job) -> Expected:
    """Every rank has its part of each parameter, one after the other."""
    (tag,) = Path(job.given).glob("global_step1")
    ranks = len(list(tag.glob("*optim_states.pt")))
    load = lambda name: torch.load(tag / name, weights_only=False, mmap=True)  # noqa: E731
    flat = [
        load(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]["fp32_flat_groups"][0]
        for rank in range(ranks)
    ]
    shapes = load("zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"][0]
    at = 0
    for name, shape in shapes.items():
        share = -(-prod(shape) // ranks)
        whole = torch.cat([one[at : at + share] for one in flat])[: prod(shape)]
        yield name, whole.reshape(shape).to(torch.bfloat16)
        at += share


def from_dcp(job: Job) -> Expected:
    yield from of_dcp(Path(job.given)).items()


def linear(job: Job) -> Expected:
    folder = Path(job.given).parent
    names = {"linear": ("base", "chat"), "linear-mid": ("../base", "../other"), "8b-linear": ("a", "b")}[job.name]
    one, other = (Lazy(folder / name) for name in names)
    for name, tensor in one.items():
        yield name, ((tensor.float() + other[name].float()) / 2).to(tensor.dtype)


def lora(job: Job) -> Expected:
    folder = Path(job.given).parent
    base = Lazy(folder / {"lora": "base", "lora-mid": "../base", "8b-lora": "../two/a"}[job.name])
    adapter = Lazy(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    for name, tensor in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in adapter:
            yield name, tensor
            continue
        a, b = (adapter[f"{module}.lora_{side}.weight"].double() for side in "AB")
        yield name, (tensor.double() + b @ a * (config["lora_alpha"] / config["r"])).to(tensor.dtype)


def exact(found: Tensors, expected: Expected) -> int:
    names = set()
    for name, tensor in expected:
        mine = found[name]
        assert mine.dtype == tensor.dtype, name
        assert mine.shape == tensor.shape, name
        assert torch.equal(mine.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
        names.add(name)
    assert names == set(drawn(found)), names ^ set(drawn(found))
    return len(names)


def close(found: Tensors, expected: Expected) -> int:
    """As close as another order of the same sums: one step of the type."""
    names = set()
    for name, tensor in expected:
        step = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(found[name], tensor, rtol=step, atol=step * 1e-2)
        names.add(name)
    assert names == set(found)
    return len(names)


def by_value(job: Job, found: Tensors) -> int:
    """Each tensor of a LLaVA is one of its sources', cast, whatever it is called; the vocabulary may have grown."""
    folder = Path(job.given).parent
    if job.size == "small":
        root = next(one for one in folder.parents if one.name == "small") / "xtuner"
        have = [*load_file(GOLDEN / "xtuner" / "single_frozen" / "truth.safetensors").values()]
        have += [*Lazy(root / "base_llm").values(), *torch.load(root / "base_clip" / "pytorch_model.bin").values()]
    else:
        have = [*torch.load(folder / "vision" / "pytorch_model.bin").values(), *_zeros(folder)]
    hashes = {_hash(one.to(torch.bfloat16)) for one in have if one.is_floating_point()}
    heads = {_hash(one[:256].to(torch.bfloat16)) for one in have if one.is_floating_point() and one.ndim == 2}
    for name in drawn(found):
        tensor = found[name]
        grows = "embed" in name or "lm_head" in name
        known = _hash(tensor.to(torch.bfloat16)) in hashes
        assert known or (grows and _hash(tensor[:256].to(torch.bfloat16)) in heads), name
    return len(found)


def _zeros(folder: Path) -> Iterator[torch.Tensor]:
    for tensor in Lazy(folder / "llm").values():
        yield torch.zeros(tensor.shape, dtype=torch.bfloat16)
    yield from (torch.zeros(shape) for shape in ((4096, 1024), (4096, 4096), (4096,)))


def _hash(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), hashlib.sha1(tensor.flatten().view(torch.uint8).numpy()).digest()


_AS_IS = ("reshard", "to-dcp", "to-bin", "reshard-mid", "8b-reshard")
ORACLES: dict[str, Callable[[Job, Tensors], int]] = {
    **dict.fromkeys(_AS_IS, lambda job, found: exact(found, as_is(job))),
    **dict.fromkeys(("cast-mid", "8b-cast"), lambda job, found: exact(found, cast(job))),
    **dict.fromkeys(("zero3", "zero3-fp32"), lambda job, found: exact(found, golden(job, "zero/llama_z3_w2_bf16"))),
    **dict.fromkeys(("zero3-mid", "8b-zero3"), lambda job, found: exact(found, zero3(job))),
    "dcp": lambda job, found: exact(found, golden(job, "dcp/fsdp2_w2_bf16")),
    "dcp-mid": lambda job, found: exact(found, from_dcp(job)),
    **dict.fromkeys(("linear", "linear-mid", "8b-linear"), lambda job, found: close(found, linear(job))),
    **dict.fromkeys(("lora", "lora-mid", "8b-lora"), lambda job, found: close(found, lora(job))),
    **dict.fromkeys(("llava", "llava-tree", "8b-llava"), by_value),
}


def checked(job: Job, out: Path) -> bool:
    if job.name not in ORACLES:
        print(f"{job.name}: no other tool was asked")
        return True
    try:
        print(
            f"{job.name}: {ORACLES[job.name](job, written(job, out))} tensors are what other tools make of the sources"
        )
    except Exception:  # noqa: BLE001  # the next one is looked at too
        traceback.print_exc()
        return False
    return True


def main() -> None:
    jobs = {job.name: job for job in read_jobs(Path(sys.argv[1]))}
    found = [checked(jobs[out.name], out) for out in sorted(Path(sys.argv[2]).iterdir())]
    sys.exit(not all(found))


if __name__ == "__main__":
    main()
