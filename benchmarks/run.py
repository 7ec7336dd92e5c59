"""Measures shardmerge beside the floor of the machine and beside what people use today.

    python -m benchmarks.run [--cases zero2-1g,rename-1g] [--rounds 5] [--deepspeed-python PATH]

All contenders of a case run in turn, round after round, each a whole process measured from outside; a first round
warms the page cache and is thrown away. Results go to ``benchmarks/results``, and ``docs/benchmarks.md`` is written
from them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.harness import Measured, answer, measure, succeed
from benchmarks.machine import ROOT, machine_card, provenance
from benchmarks.merges import write_lora
from benchmarks.peers import environment
from benchmarks.synthetic import llama_of, write_safetensors, write_zero

RESULTS = ROOT / "benchmarks" / "results"
_GIB = 1 << 30

_MAPPING = """\
shardmerge: 1
sources: {src: SOURCE}
tensors:
  transformer.{rest...}: "src:model.{rest...}"
  lm_head.weight: "src:lm_head.weight"
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing the job.

    Attributes
    ----------
    key, title
        For machines and for people.
    kind
        ``ours``, ``peer`` or ``floor``.
    command
        Given the output path, what to run.
    shown
        The command as people would type it.
    same
        Whether its tensors must equal ours, bit by bit.
    """

    key: str
    title: str
    kind: str
    command: Callable[[Path], Sequence[str | Path]]
    shown: str
    same: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """A job and everyone who does it.

    Attributes
    ----------
    key, title, about
        For machines, for a heading, and for a reader.
    prepare
        Writes the input below a directory and returns it.
    contend
        Who does it; given the input, and the file whose copy is the floor.
    """

    key: str
    title: str
    about: str
    prepare: Callable[[Path], Path]
    contend: Callable[[Path, Path], list[Contender]]


# ---- the cases


def cases(deepspeed: Path) -> list[Case]:
    """Returns all cases, smallest first."""

    def zero(key: str, stage: int, world: int, nbytes: int) -> Case:
        gib = nbytes // _GIB
        return Case(
            key,
            f"DeepSpeed ZeRO-{stage}, {world} ranks, {gib} GiB of fp32 weights, to bf16",
            "A LLaMA with random weights; the Adam moments are holes, which nobody here reads. Input: fp32 partitions. "
            "Output: one safetensors file of bf16.",
            lambda folder: write_zero(folder, llama_of(nbytes).tensors(), stage=stage, world=world, fill=True).parent,
            lambda source, file: _zero_contenders(source, file, deepspeed),
        )

    rename = Case(
        "rename-1g",
        "Rename the tensors of a safetensors file of 1 GiB",
        "A LLaMA in bf16, `model.*` to `transformer.*`, values untouched.",
        _prepare_rename,
        _rename_contenders,
    )
    lora = Case(
        "lora-0.5b",
        "Merge a LoRA with r = 64 on all linear layers into a bf16 model of 0.5 B parameters",
        "A LLaMA and an fp32 adapter, both with random weights. peft rounds twice more than shardmerge, so the "
        "weights are not the same to the bit; `tests/test_adapters.py` holds the difference to that.",
        lambda folder: write_lora(folder, llama_of(2 * _GIB), 64, fill=True).parent,
        _lora_contenders,
    )
    return [
        zero("zero2-1g", 2, 2, _GIB),
        zero("zero3-1g", 3, 8, _GIB),
        rename,
        lora,
        zero("zero2-4g", 2, 2, 4 * _GIB),
    ]


def _zero_contenders(source: Path, file: Path, deepspeed: Path) -> list[Contender]:
    ours: list[str | Path] = [sys.executable, "-m", "shardmerge", "convert", source]
    script: list[str | Path] = [deepspeed, "-m"]
    bf16 = ("--dtype", "bf16", "--safe_serialization")
    return [
        *_ours(lambda out: [*ours, out, "--dtype", "bfloat16", "--json"], "shardmerge convert IN OUT --dtype bfloat16"),
        Contender(
            "zero_to_torch",
            f"DeepSpeed {environment.VERSION} zero_to_torch",
            "peer",
            lambda out: [*script, "deepspeed.utils.zero_to_torch", source, out, *bf16],
            "zero_to_torch.py IN OUT --dtype bf16 --safe_serialization",
            same=True,
        ),
        Contender(
            "zero_to_fp32",
            f"DeepSpeed {environment.VERSION} zero_to_fp32 (writes fp32, twice the bytes)",
            "peer",
            lambda out: [*script, "deepspeed.utils.zero_to_fp32", source, out, "--safe_serialization"],
            "zero_to_fp32.py IN OUT --safe_serialization",
        ),
        *_floor(file),
    ]  # fmt: skip


def _prepare_rename(folder: Path) -> Path:
    folder.mkdir()
    shapes = llama_of(2 * _GIB).tensors()
    write_safetensors(folder / "model.safetensors", shapes, fill=True)
    (folder / "mapping.yaml").write_text(_MAPPING.replace("SOURCE", "model.safetensors"), "utf-8")
    return folder


def _rename_contenders(source: Path, file: Path) -> list[Contender]:
    mapping = source / "mapping.yaml"
    return [
        *_ours(
            lambda out: [sys.executable, "-m", "shardmerge", "run", mapping, "--out", out, "--json"],
            "shardmerge run mapping.yaml --out OUT",
        ),
        Contender(
            "load-save",
            "safetensors.torch: load_file, rename, save_file",
            "peer",
            lambda out: [
                "sh", "-c", 'mkdir "$3" && exec "$0" -m benchmarks.peers.rename "$1" "$3/$2"',
                sys.executable, source / "model.safetensors", "model.safetensors", out,
            ],
            "load_file; rename; save_file",
            same=True,
        ),
        *_floor(file),
    ]  # fmt: skip


def _lora_contenders(source: Path, file: Path) -> list[Contender]:
    return [
        *_ours(
            lambda out: [sys.executable, "-m", "shardmerge", "run", source / "mapping.yaml", "--out", out, "--json"],
            "shardmerge run mapping.yaml --out OUT",
        ),
        Contender(
            "peft",
            f"peft {version('peft')}: from_pretrained, merge_and_unload, save_pretrained",
            "peer",
            lambda out: [
                sys.executable, "-m", "benchmarks.peers.peft_merge", source / "base", source / "adapter", out,
            ],
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)",
        ),
        *_floor(file),
    ]  # fmt: skip


def _ours(command: Callable[[Path], list[str | Path]], shown: str) -> list[Contender]:
    return [
        Contender("shardmerge", "shardmerge", "ours", command, shown),
        Contender(
            "shardmerge-no-sync",
            "shardmerge --no-sync",
            "ours",
            lambda out: [*command(out), "--no-sync"],
            f"{shown} --no-sync",
            same=True,
        ),
    ]


def _floor(file: Path) -> list[Contender]:
    """Copies of a file of as many bytes as we write: the first also to the disk, the second to the page cache."""
    copy = 'mkdir "$1" && cp "$0" "$1/copy"'
    return [
        Contender(
            "cp-sync",
            "cp and sync of a file as large as the output",
            "floor",
            lambda out: ["sh", "-c", f'{copy} && sync "$1/copy"', file, out],
            "cp FILE OUT && sync OUT",
        ),
        Contender(
            "cp",
            "cp of a file as large as the output",
            "floor",
            lambda out: ["sh", "-c", copy, file, out],
            "cp FILE OUT",
        ),
    ]


# ---- measuring


def run_case(case: Case, scratch: Path, rounds: int) -> dict[str, object]:
    """Measures a case and returns its result as JSON values."""
    source = case.prepare(scratch / "source")
    file = scratch / "reference" / "model.safetensors"
    contenders = case.contend(source, file)
    checks = _warm_up(contenders, scratch)
    runs: dict[str, list[dict[str, object]]] = {contender.key: [] for contender in contenders}
    for number in range(rounds):
        turn = number % len(contenders)
        for place, contender in enumerate(contenders[turn:] + contenders[:turn]):
            figures = _run(contender, scratch / "out")
            runs[contender.key].append({"round": number, "place": place, **figures})
        print(f"  round {number + 1} of {rounds}: " + _line(runs), flush=True)
    return {
        "case": {"key": case.key, "title": case.title, "about": case.about},
        "rounds": rounds,
        "checks": checks,
        "contenders": [_summary(contender, runs[contender.key]) for contender in contenders],
        "ratios": _ratios(contenders, runs),
    }


def _warm_up(contenders: list[Contender], scratch: Path) -> list[str]:
    """Runs everyone once; keeps our output as the reference, and compares the others with it."""
    checks = []
    for contender in contenders:
        out = scratch / ("out" if contender.key != "shardmerge" else "reference")
        succeed(_measure(contender, out))
        if contender.same:
            both: list[str | Path] = [sys.executable, "-m", "shardmerge", "diff", scratch / "reference", out, "--json"]
            if not answer(measure(both, cwd=ROOT))["equal"]:
                raise RuntimeError(f"{contender.title} has written other tensors than shardmerge")
            checks.append(f"{contender.title} and shardmerge write equal tensors, bit by bit")
        if contender.key != "shardmerge":
            shutil.rmtree(out)
    return checks


def _run(contender: Contender, out: Path) -> dict[str, object]:
    os.sync()  # whoever ran before has no share in our waiting for the disk
    load = os.getloadavg()[0]
    done = succeed(_measure(contender, out))
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    figures: dict[str, object] = {
        "wall": round(done.wall, 4),
        "cpu": round(done.cpu, 4),
        "user": round(done.user, 4),
        "system": round(done.system, 4),
        "peak": done.peak,
        "anonymous": done.anonymous,
        "written": written,
        "load": round(load, 2),
    }
    return figures | ({"planned_peak": answer(done)["planned_peak"]} if contender.kind == "ours" else {})


def _measure(contender: Contender, out: Path) -> Measured:
    # DeepSpeed looks for an accelerator and warns of what it does not find.
    return measure(contender.command(out), cwd=ROOT, env={"DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"})


def _line(runs: dict[str, list[dict[str, object]]]) -> str:
    return ", ".join(f"{key} {figures[-1]['wall']:.2f} s" for key, figures in runs.items())


# ---- results

_FIGURES = ("wall", "cpu", "peak", "anonymous", "written")


def _summary(contender: Contender, runs: list[dict[str, object]]) -> dict[str, object]:
    figures = {name: _spread([float(str(run[name])) for run in runs]) for name in _FIGURES}
    if contender.kind == "ours":
        figures["planned_peak"] = _spread([float(str(run["planned_peak"])) for run in runs])
    return {
        "key": contender.key,
        "title": contender.title,
        "kind": contender.kind,
        "command": contender.shown,
        **figures,
        "runs": runs,
    }


def _ratios(contenders: list[Contender], runs: dict[str, list[dict[str, object]]]) -> list[dict[str, object]]:
    """Returns ours over theirs, round by round, so that what slowed a whole round down cancels out."""
    ours = [contender.key for contender in contenders if contender.kind == "ours"]
    found: list[dict[str, object]] = []
    for mine in ours:
        for other in contenders:
            if other.kind == "ours":
                continue
            pairs = list(zip(runs[mine], runs[other.key], strict=True))
            entry: dict[str, object] = {"ours": mine, "over": other.key}
            for name in ("wall", "cpu", "peak", "anonymous"):
                values = [float(str(a[name])) / float(str(b[name])) for a, b in pairs if float(str(b[name]))]
                entry[name] = _spread(values)
            found.append(entry)
    return found


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A directory for gigabytes, removed whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        yield Path(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks; see docs/benchmarks.md.")
    parser.add_argument("--cases", default="", help="keys, comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where 12 GiB of files may lie meanwhile")
    parser.add_argument("--deepspeed-python", type=Path, help="default: an environment of its own, built when missing")
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    return parser.parse_args()


def main() -> None:
    """Measures, writes the results, and renders the page."""
    given = _arguments()
    chosen = [key for key in given.cases.split(",") if key]
    home = ROOT / ".envs" / "deepspeed"
    wanted = not chosen or any(key.startswith("zero") for key in chosen)
    deepspeed = given.deepspeed_python or (environment.build(home) if wanted else home / "bin" / "python")
    known = cases(deepspeed)
    unknown = set(chosen) - {case.key for case in known}
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(case.key for case in known)}")
    RESULTS.mkdir(exist_ok=True)
    for case in known:
        if chosen and case.key not in chosen:
            continue
        print(case.title, flush=True)
        with _scratch(given.scratch) as folder:
            card = machine_card(folder, deepspeed if case.key.startswith("zero") else None, given.note)
            result = {**provenance(), "machine": card, **run_case(case, folder, given.rounds)}
        (RESULTS / f"{case.key}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    report.write(RESULTS, ROOT / "docs" / "benchmarks.md")


if __name__ == "__main__":
    main()
