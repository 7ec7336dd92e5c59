"""Claims against files: every file of a DeepSpeed checkpoint taken away, cut, swapped or replaced in turn.

What comes out is right, that is equal to what DeepSpeed itself reads from the untouched checkpoint, or it is refused,
and the refusal names the place. The checkpoints are those of ``tests/golden``, written by DeepSpeed, XTuner and the
Trainer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import shardmerge as sm
from benchmarks.synthetic import write_zero
from shardmerge.sources.deepspeed_files import DeepSpeedView
from tests.conftest import GOLDEN, read_all, same_values, shardmerge

Files = dict[str, bytes]


@dataclass(frozen=True)
class Saved:
    """A tag directory and what DeepSpeed reads from it."""

    name: str
    tag: Path
    truth: Path
    stage: int

    def files(self) -> Files:
        return {path.name: path.read_bytes() for path in sorted(self.tag.glob("*_states.pt"))}


@cache
def _values(truth: Path) -> dict[str, np.ndarray]:
    tensors = load_file(truth)
    return {name: (t.double() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def _saved(case: Path) -> Iterator[Saved]:
    about = json.loads((case / "case.json").read_text())
    entry = case / about["entry"] if "entry" in about else next(case.glob("checkpoint-*"))
    if not entry.is_dir():
        return
    latest = entry / "latest"
    tag = entry / latest.read_text().strip() if latest.is_file() else entry
    yield Saved(case.name, tag, case / "truth.safetensors", about["stage"])
    first = case / "truth_first_tag.safetensors"
    if first.is_file():
        other = next(item for item in entry.iterdir() if item.is_dir() and item != tag)
        yield Saved(f"{case.name}, first tag", other, first, about["stage"])


CASES = [saved for kind in ("zero/*", "xtuner/*", "hf_trainer") for path in sorted(GOLDEN.glob(f"{kind}/case.json"))
         for saved in _saved(path.parent)]  # fmt: skip


def relatives(saved: Saved) -> list[Saved]:
    """Checkpoints of the same stage with files of the same names, the likest first."""
    names = set(saved.files())
    mine = [other for other in CASES if other.tag != saved.tag and set(other.files()) == names]
    return sorted(mine, key=lambda other: -len(os.path.commonprefix([other.name, saved.name])))


@dataclass(frozen=True)
class Damage:
    """One input of the table: what was done, the files that it left, and whose truth may come out."""

    what: str
    touched: str
    files: Files
    right: tuple[Saved, ...]


def _kind(name: str) -> str:
    return "optim" if "optim" in name else "model"


def damages(saved: Saved, most_relatives: int = 100) -> Iterator[Damage]:
    """All inputs made of one checkpoint."""
    files = saved.files()
    for name, data in files.items():
        yield Damage("taken away", name, {n: d for n, d in files.items() if n != name}, (saved,))
        for what, rest in (("emptied", b""), ("cut in half", data[: len(data) // 2]), ("cut by a byte", data[:-1])):
            yield Damage(what, name, {**files, name: rest}, (saved,))
    for kind in ("model", "optim"):
        mine = [name for name in files if _kind(name) == kind]
        if mine:
            yield Damage(
                f"all {kind} files taken away", kind, {n: d for n, d in files.items() if n not in mine}, (saved,)
            )
        for one, two in combinations(mine, 2):
            yield Damage("swapped", one, {**files, one: files[two], two: files[one]}, (saved,))
            yield Damage("replaced by a neighbour", one, {**files, one: files[two]}, (saved,))
    for other in relatives(saved)[:most_relatives]:
        theirs = other.files()
        for name in files:
            yield Damage(f"replaced by that of {other.name}", name, {**files, name: theirs[name]}, (saved, other))
        for kind in ("model", "optim"):
            mixed = {name: theirs[name] if _kind(name) == kind else data for name, data in files.items()}
            yield Damage(f"{kind} files of {other.name}", kind, mixed, (saved, other))


def outcome(damage: Damage, folder: Path, view: DeepSpeedView = "fp32") -> str:
    """``right``, ``WRONG``, or the code of the refusal, which names the place."""
    folder.mkdir()
    for name, data in damage.files.items():
        (folder / name).write_bytes(data)
    try:
        catalog = sm.inspect(folder, view=view)
    except sm.ShardmergeError as error:
        return error.code if str(folder) in str(error) else f"{error.code} WITHOUT A PLACE"
    found = read_all(catalog)
    rights = (_values(saved.truth) for saved in damage.right)
    return "right" if any(is_truth(found, truth) for truth in rights) and not catalog.absent else "WRONG"


def is_truth(found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == truth.keys() and all(same_values(found[name], truth[name]) for name in truth)


# Beside what a checkpoint's own files give: files of the likest other one, such as the other save of the run.
RELATIVES = 1
# No two saves and no two runs: damage of one file among others, and the shortest way to another model.
NEVER_RIGHT = ("taken away", "emptied", "cut", "swapped")


@pytest.mark.parametrize("saved", CASES, ids=lambda saved: saved.name)
def test_a_damaged_checkpoint_is_right_or_refused(saved: Saved, tmp_path: Path) -> None:
    table = list(damages(saved, RELATIVES))
    found: Counter[str] = Counter()
    for index, damage in enumerate(table):
        code = outcome(damage, tmp_path / str(index))
        assert code in REFUSALS or code == "right", f"{code}: {damage.what}, {damage.touched}"
        assert code != "right" or not damage.what.startswith(NEVER_RIGHT), f"{damage.what}, {damage.touched}"
        found[code] += 1
    assert len(table) >= 5
    assert found["right"] <= 4 * RELATIVES  # two runs that are the same to the bit


# What may be said of a damaged tag. "unknown-format": nothing is left in the directory.
REFUSALS = frozenset({
    "missing-rank", "mixed-runs", "zero-layout", "not-torch", "truncated-file", "damaged-zip", "hostile-zip",
    "unknown-format",
})  # fmt: skip


def test_the_table_is_large() -> None:
    """Some hundreds of inputs, of every stage, on every tool that writes such checkpoints."""
    assert {saved.stage for saved in CASES} == {0, 1, 2, 3}
    assert {"hf_trainer", "frozen_z2", "two_saves_z1_w2_bf16", "other_run_z2_w2_bf16"} <= {s.name for s in CASES}
    assert sum(1 for saved in CASES[::10] for _ in damages(saved, RELATIVES)) > 100


# --- what one model file states, changed claim by claim ---


def _listed(root: dict) -> dict:
    """The first group of param_shapes; stage 0 has none, or of old DeepSpeeds the list."""
    return root["param_shapes"][0]


def _rename(table: dict, old: str, new: str) -> None:
    pairs = [(new if name == old else name, value) for name, value in table.items()]
    table.clear()
    table.update(pairs)


def _reshape(root: dict) -> None:
    shapes = _listed(root)
    name = next(name for name, shape in shapes.items() if len(shape) > 1 and len(set(shape)) > 1)
    shapes[name] = torch.Size(reversed(shapes[name]))


def _grow(root: dict) -> None:
    shapes = _listed(root)
    name = next(name for name, shape in shapes.items() if len(shape) > 1)
    shapes[name] = torch.Size((shapes[name][0] + 1, *shapes[name][1:]))


def _exchange(root: dict) -> None:
    """Two parameters of one shape change their names."""
    shapes = _listed(root)
    one, two = next((a, b) for a, b in combinations(shapes, 2) if shapes[a] == shapes[b])
    _rename(shapes, one, "?")
    _rename(shapes, two, one)
    _rename(shapes, "?", two)


def _first(root: dict) -> str:
    return next(iter(_listed(root)))


def _stage(number: int) -> Callable[[dict], None]:
    return lambda root: root["ds_config"]["zero_optimization"].update(stage=number)


def _frozen(root: dict, key: str) -> dict:
    table = root[key]
    assert table, "no frozen parameters"
    return table


EDITS: dict[str, Callable[[dict], object]] = {
    "stage 0": _stage(0),
    "stage 1": _stage(1),
    "stage 2": _stage(2),
    "stage 3": _stage(3),
    "another micro-batch": lambda root: root["ds_config"].update(train_micro_batch_size_per_gpu=3),
    "more ranks": lambda root: root.update(dp_world_size=root["dp_world_size"] + 1),
    "fewer ranks": lambda root: root.update(dp_world_size=root["dp_world_size"] - 1),
    "two model-parallel ranks": lambda root: root.update(mp_world_size=2, checkpoint_parallel_dimensions=None),
    "two tensor-parallel ranks": lambda root: root["checkpoint_parallel_dimensions"].update(tp_degree=2),
    "two pipeline stages": lambda root: root["checkpoint_parallel_dimensions"].update(pp_degree=2),
    "experts": lambda root: root.update(num_experts=[4]),
    "a later step": lambda root: root.update(global_steps=root["global_steps"] + 2),
    "an earlier step": lambda root: root.update(global_steps=root["global_steps"] - 1),
    "a skipped step": lambda root: root.update(skipped_steps=1),
    "another DeepSpeed": lambda root: root.update(ds_version="0.18.1"),
    "a shape turned": _reshape,
    "a shape grown": _grow,
    "two names exchanged": _exchange,
    "a parameter less": lambda root: _listed(root).pop(_first(root)),
    "a parameter more": lambda root: _listed(root).update({"another.weight": torch.Size((3, 3))}),
    "a group less": lambda root: root["param_shapes"].pop(),
    "no param_shapes": lambda root: root.update(param_shapes=None),
    "a frozen shape grown": lambda root: root["frozen_param_shapes"].update(
        {name: torch.Size((7, *shape)) for name, shape in _frozen(root, "frozen_param_shapes").items()}
    ),
    "a frozen parameter more": lambda root: _frozen(root, "frozen_param_shapes").update(more=torch.Size((2,))),
    "no frozen fragments": lambda root: _frozen(root, "frozen_param_fragments").clear(),
    "an owner that is nowhere": lambda root: root["shared_params"].update({"tied.weight": "nowhere.weight"}),
    "an owner of another shape": lambda root: root["shared_params"].update({_first(root): list(_listed(root))[1]}),
    "a placeholder in module": lambda root: root["module"].update({_first(root): torch.empty(0)}),
    "a module weight turned": lambda root: root["module"].update(
        {name: root["module"][name].t().contiguous() for group in root["param_shapes"] for name, shape in group.items()
         if len(shape) == 2 and shape[0] != shape[1]}
    ),
    "other module weights": lambda root: root["module"].update(
        {name: root["module"][name] + 1 for group in root["param_shapes"] for name in group}
    ),
}  # fmt: skip


def edited(saved: Saved, what: str) -> Damage | None:
    """The checkpoint with one claim of rank 0's model file changed, or ``None`` where it makes no such claim."""
    files = saved.files()
    name = next(name for name in files if _kind(name) == "model")
    root = torch.load(saved.tag / name, weights_only=False)
    before = torch.load(saved.tag / name, weights_only=False)
    try:
        EDITS[what](root)
    except (KeyError, IndexError, StopIteration, TypeError, AttributeError, AssertionError, ModuleNotFoundError):
        return None
    if repr(root) == repr(before):
        return None
    folder = Path(tempfile.mkdtemp())
    torch.save(root, folder / name)  # under its own name, which the file keeps inside
    files[name] = (folder / name).read_bytes()
    shutil.rmtree(folder)
    return Damage(what, name, files, (saved,))


# Each claim and what may become of a change of it: "right" where it changes no value that comes out.
COUNTERS = ("a later step", "an earlier step", "a skipped step")
HARMLESS = ("a placeholder in module", "an owner that is nowhere", "an owner of another shape", "no frozen fragments")
EDITED = [saved for saved in CASES if saved.name in {
    "llama_z1_w2_bf16", "llama_z2_w2_fp16", "llama_z3_w2_bf16", "bag_z1_w3_bf16", "bag_z2_w3_bf16", "bag_z3_w3_bf16",
    "tied_z2_w2_bf16", "tied_z3_w2_bf16", "lora_z2_w2_bf16", "subgroups_bag_z3_w3_bf16",
}]  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_every_claim_is_compared_with_the_files(what: str, tmp_path: Path) -> None:
    inputs = [damage for saved in EDITED if (damage := edited(saved, what)) is not None]
    assert inputs
    for index, damage in enumerate(inputs):
        (saved,) = damage.right
        code = outcome(damage, tmp_path / str(index))
        if code == "right":
            # Below stage 3 the weights say that the files are of one save, whatever the counters say.
            assert what in HARMLESS or (what in COUNTERS and saved.stage < 3), saved.name
        else:
            assert code in REFUSALS | {"kind-not-yet", "missing-layer"}, f"{code}: {saved.name}"


# --- what the refusals say, and where their hints lead ---


def _copy(saved: Saved, folder: Path, *, without: str = "") -> Path:
    folder.mkdir(parents=True)
    for name, data in saved.files().items():
        if not without or without not in name:
            (folder / name).write_bytes(data)
    return folder


def _case(name: str) -> Saved:
    return next(saved for saved in CASES if saved.name == name)


@pytest.mark.parametrize("stage", [1, 2])
def test_without_optimizer_files_the_16_bit_module_is_offered_and_taken(stage: int, tmp_path: Path) -> None:
    saved = _case(f"llama_z{stage}_w2_bf16")
    folder = _copy(saved, tmp_path / "tag", without="optim")
    done = shardmerge("convert", folder, tmp_path / "out", code=1)
    for expected in ("[missing-rank]", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "--view module"):
        assert expected in done.stderr
    shardmerge("convert", folder, tmp_path / "out", "--view", "module")
    module = read_all(sm.inspect(saved.tag, view="module"))
    assert is_truth(read_all(sm.inspect(tmp_path / "out")), module)
    truth = load_file(saved.truth)
    assert is_truth(module, {name: tensor.bfloat16().double().numpy() for name, tensor in truth.items()})


def test_without_optimizer_files_stage_3_has_nothing_but_what_lies_beside_it(tmp_path: Path) -> None:
    folder = _copy(_case("llama_z3_w2_bf16"), tmp_path / "run" / "tag", without="optim")
    text = shardmerge("convert", folder, tmp_path / "out", code=1).stderr
    assert "[missing-rank]" in text
    assert "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt" in text
    assert "--view module" not in text
    whole = tmp_path / "run" / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, whole)
    assert f"convert {whole}" in shardmerge("convert", folder, tmp_path / "out", code=1).stderr
    shardmerge("convert", whole, tmp_path / "out")


@pytest.mark.parametrize("saved", [saved for saved in CASES if 1 <= saved.stage <= 2], ids=lambda saved: saved.name)
def test_the_module_view_needs_no_optimizer_file(saved: Saved, tmp_path: Path) -> None:
    """Whatever became of them: it is the way out that the refusals name."""
    expected = read_all(sm.inspect(saved.tag, view="module"))
    for index, without in enumerate(("optim", "pp_rank_0")):
        folder = _copy(saved, tmp_path / str(index), without=without)
        assert is_truth(read_all(sm.inspect(folder, view="module")), expected)


@pytest.mark.parametrize("view", ["fp32", "module"])
def test_files_of_a_second_model_parallel_rank_are_seen_whatever_is_stated(view: DeepSpeedView, tmp_path: Path) -> None:
    """Older files, or some that lie, state one rank."""
    folder = _copy(_case("llama_z2_w2_bf16"), tmp_path / "tag")
    root = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save(root, folder / "mp_rank_01_model_states.pt")
    text = shardmerge("inspect", folder, "--view", view, code=1).stderr
    assert "[mixed-runs]" in text
    assert "other model-parallel ranks than the run has" in text


def test_two_saves_say_their_steps_and_the_module_is_offered(tmp_path: Path) -> None:
    late, early = (_case(f"two_saves_z1_w2_bf16{which}") for which in ("", ", first tag"))
    folder = _copy(late, tmp_path / "tag")
    for name, data in early.files().items():
        if "optim" in name:
            (folder / name).write_bytes(data)
    text = shardmerge("convert", folder, tmp_path / "out", code=1).stderr
    for expected in ("[mixed-runs]", "1 steps in bf16_zero_pp_rank_0", "2, as in mp_rank_00", "--view module"):
        assert expected in text
    shardmerge("convert", folder, tmp_path / "out", "--view", "module")
    assert is_truth(read_all(sm.inspect(tmp_path / "out")), read_all(sm.inspect(late.tag, view="module")))


def test_a_rank_of_another_run_is_known_by_its_weights(tmp_path: Path) -> None:
    """The same model, settings, version and number of steps: the masters do not round to the module."""
    mine, other = _case("llama_z2_w2_bf16"), _case("other_run_z2_w2_bf16")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    folder = _copy(mine, tmp_path / "tag")
    (folder / name).write_bytes(other.files()[name])
    text = shardmerge("convert", folder, tmp_path / "out", code=1).stderr
    assert "[mixed-runs]" in text
    assert f"sampled weights of {folder.name}/{name}" in text


def test_swapped_files_of_two_ranks_are_named(tmp_path: Path) -> None:
    """Of one length in stage 3, and alike in all that they state: only the name inside tells."""
    folder = _copy(_case("llama_z3_w2_bf16"), tmp_path / "tag")
    one, two = (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    text = shardmerge("inspect", folder, code=1).stderr
    assert "[mixed-runs]" in text
    assert f"at: {one}" in text
    assert f"found: {two.name}" in text
    one.rename(tmp_path / "x")  # the hint: each its own name again
    two.rename(one)
    (tmp_path / "x").rename(two)
    assert is_truth(read_all(sm.inspect(folder)), _values(_case("llama_z3_w2_bf16").truth))


def test_files_of_two_stages_in_one_directory_are_not_mixed(tmp_path: Path) -> None:
    folder = _copy(_case("llama_z3_w2_bf16"), tmp_path / "tag")
    _copy_into(_case("llama_z2_w2_bf16"), folder, "model")
    assert "[mixed-runs]" in shardmerge("inspect", folder, code=1).stderr


def _copy_into(saved: Saved, folder: Path, kind: str) -> None:
    for name, data in saved.files().items():
        if kind in name:
            (folder / name).write_bytes(data)


def test_a_module_of_placeholders_and_weights_is_no_module_view(tmp_path: Path) -> None:
    """stage3_param_persistence_threshold may leave small parameters whole; the others are still placeholders."""
    saved = _case("two_saves_z3_w2_bf16")
    folder = _copy(saved, tmp_path / "tag")
    truth = load_file(saved.truth)
    for path in folder.glob("*model_states.pt"):
        root = torch.load(path, weights_only=False)
        shapes = {name: shape for group in root["param_shapes"] for name, shape in group.items()}
        small = [name for name in shapes if name != next(iter(shapes))]
        root["module"].update({name: truth[name].bfloat16() for name in small})
        torch.save(root, path)
    text = shardmerge("inspect", folder, "--view", "module", code=1).stderr
    assert "[no-module-view]" in text
    assert "3 tensors without data" in text  # the large one, and two frozen ones
    assert is_truth(read_all(sm.inspect(folder)), _values(saved.truth))


# --- what optimizer files state, on files that torch alone can write ---


def _synthetic(folder: Path, edit: Callable[[dict], object], rank: int = 1) -> Path:
    """Three ranks of stage 3 by Adam, and a change of one rank's optimizer file."""
    tag = write_zero(folder, {"a.weight": (7, 5), "b.weight": (3,)}, stage=3, world=3, fill=True)
    for which in range(3):
        path = tag / f"bf16_zero_pp_rank_{which}_mp_rank_00_optim_states.pt"
        root = torch.load(path, weights_only=True)
        base = root["optimizer_state_dict"]["optimizer_state_dict"]
        base["param_groups"] = [{"lr": 0.01, "betas": (0.9, 0.999), "params": [0]}]
        if which == rank:
            edit(root)
        torch.save(root, path)
    return tag


def _base(root: dict) -> dict:
    return root["optimizer_state_dict"]["optimizer_state_dict"]


def _stepped(root: dict) -> None:
    _base(root)["state"][0]["step"] = torch.tensor(7.0)


OPTIM_EDITS: dict[str, Callable[[dict], object]] = {
    "another learning rate": lambda root: _base(root)["param_groups"][0].update(lr=0.02),
    "more steps": _stepped,
    "another world": lambda root: root["optimizer_state_dict"].update(partition_count=4),
    "another DeepSpeed": lambda root: root.update(ds_version="0.9.5"),
    "other settings": lambda root: root.update(ds_config={"train_batch_size": 8}),
}


@pytest.mark.parametrize("what", OPTIM_EDITS)
def test_optimizer_files_of_all_ranks_agree(what: str, tmp_path: Path) -> None:
    assert sm.inspect(_synthetic(tmp_path / "same", lambda root: None)).entries
    text = shardmerge("inspect", _synthetic(tmp_path / "run", OPTIM_EDITS[what]), code=1).stderr
    assert "[mixed-runs]" in text
    assert "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt" in text


def test_an_adam_without_moments_has_made_no_step(tmp_path: Path) -> None:
    """What a run saves before its first step, among the files of a later one."""

    def untrained(root: dict) -> None:
        _base(root).update(state={})

    assert sm.inspect(_synthetic(tmp_path / "early", untrained)).entries  # these have made no step either
    tag = _synthetic(tmp_path / "late", untrained)
    for path in tag.iterdir():
        root = torch.load(path, weights_only=True)
        if "optim" not in path.name:
            root["global_steps"] = 7
        elif "rank_1" not in path.name:
            _stepped(root)
        torch.save(root, path)
    assert "[mixed-runs]" in shardmerge("inspect", tag, code=1).stderr


def test_a_rank_has_one_file(tmp_path: Path) -> None:
    tag = write_zero(tmp_path, {"a.weight": (7, 5)}, stage=2, world=2, fill=True)
    shutil.copy(
        tag / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    )
    text = shardmerge("inspect", tag, code=1).stderr
    assert "two files are those of rank 1" in text
    (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()  # the hint
    assert sm.inspect(tag).entries


def test_an_optimizer_begun_anew_is_told_by_the_weights(tmp_path: Path) -> None:
    """``load_checkpoint(load_optimizer_states=False)`` keeps global_steps and counts the optimizer's from 0."""
    damage = edited(_case("bag_z2_w3_bf16"), "a later step")
    assert damage is not None
    assert outcome(damage, tmp_path / "tag") == "right"
    (warning,) = sm.inspect(tmp_path / "tag").warnings
    assert "2 steps in bf16_zero_pp_rank_0" in warning
    assert "4 in the model file" in warning


def test_more_ranks_than_there_are_computers(tmp_path: Path) -> None:
    tag = _synthetic(tmp_path, lambda root: root["optimizer_state_dict"].update(partition_count=10**12))
    assert "[mixed-runs]" in shardmerge("inspect", tag, code=1).stderr


def test_the_stage_of_the_optimizer_is_that_of_the_settings(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 1}}
    tag = write_zero(tmp_path, {"a.weight": (7, 5)}, stage=2, world=1, fill=True, extra={"ds_config": settings})
    path = tag / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    root = torch.load(path, weights_only=True)
    torch.save({**root, "ds_config": settings}, path)
    text = shardmerge("inspect", tag, code=1).stderr
    assert "differ in the ZeRO stage [mixed-runs]" in text
    root["optimizer_state_dict"]["zero_stage"] = 1
    torch.save({**root, "ds_config": settings}, path)
    assert sm.inspect(tag).entries


@pytest.mark.parametrize(("case", "stage"), [("llama_z2_w2_fp16", 3), ("bag_z3_w3_bf16", 2)])
def test_the_name_of_a_model_file_tells_its_stage(case: str, stage: int, tmp_path: Path) -> None:
    damage = edited(_case(case), f"stage {stage}")
    assert damage is not None
    assert outcome(damage, tmp_path / "tag", "module") == "mixed-runs"


def test_the_model_file_of_a_model_with_fewer_parameters(tmp_path: Path) -> None:
    """The same settings; the optimizer files tell how many parameters they hold."""
    folder = _copy(_case("llama_z2_w2_bf16"), tmp_path / "tag")
    _copy_into(_case("tied_z2_w2_bf16"), folder, "model")
    text = shardmerge("inspect", folder, code=1).stderr
    assert "[zero-layout]" in text
    assert "20, as param_shapes says" in text
