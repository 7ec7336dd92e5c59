"""What the files of a DeepSpeed run state against each other: each test here is the only one of its guard.

A checkpoint that DeepSpeed wrote, of which one file was changed to say something else.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge as sm
from shardmerge.sources.deepspeed_claims import read_claims
from shardmerge.sources.name_patterns import NamePatterns
from shardmerge.sources.tensor_layouts import read_layouts
from tests.conftest import GOLDEN
from tests.deepspeed_classes import deepspeed_classes

ZERO2, ZERO3 = (GOLDEN / f"zero/llama_z{stage}_w2_bf16" for stage in (2, 3))
PADDED, FROZEN = GOLDEN / "zero/alignment_z2_w3_bf16", GOLDEN / "zero/lora_z3_w2_bf16"
Root = dict[str, Any]
MODELS, OPTIMS = "*model_states.pt", "*optim_states.pt"


@pytest.fixture(autouse=True)
def classes() -> Iterator[None]:
    with deepspeed_classes():
        yield


def changed(case: Path, folder: Path, names: str, change: Callable[[Root], object]) -> Path:
    """A copy of a tag; the last of the files of a name is changed."""
    tag = shutil.copytree(next(case.rglob("*model_states.pt")).parent, folder / "tag")
    path = sorted(tag.glob(names))[-1]
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path)
    return tag


def refused(folder: Path, **options: Any) -> sm.ShardmergeError:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(folder, **options)
    return caught.value.each()[0]


def flat_key(root: Root) -> str:
    return next(key for key in ("fp32_flat_groups", "single_partition_of_fp32_groups") if key in root)


def retyped(root: Root, dtype: torch.dtype) -> None:
    state = root["optimizer_state_dict"]
    state[flat_key(state)] = [flat.to(dtype) for flat in state[flat_key(state)]]


@pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_rank_with_partitions_of_another_type(case: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    error = refused(changed(case, tmp_path, "*optim_states.pt", lambda root: retyped(root, dtype)))
    assert (error.code, "other element types" in error.what) == ("zero-layout", True)


def test_a_rank_with_a_moment_of_another_type(tmp_path: Path) -> None:
    def halve(root: Root) -> None:
        mine = moments(root)[0]
        mine["exp_avg"] = mine["exp_avg"].half()

    error = refused(changed(ZERO2, tmp_path, OPTIMS, halve), view="exp_avg")
    assert (error.code, "other element types" in error.what) == ("zero-layout", True)


def test_a_rank_with_other_paddings(tmp_path: Path) -> None:
    def shift(root: Root) -> None:
        paddings = root["optimizer_state_dict"]["param_alignment_paddings"]
        paddings[0] = [one + 4 for one in paddings[0]]

    error = refused(changed(PADDED, tmp_path, "*optim_states.pt", shift))
    assert (error.code, "param_alignment_paddings" in error.what) == ("mixed-runs", True)


def test_a_frozen_fragment_of_another_type(tmp_path: Path) -> None:
    def retype(root: Root) -> None:
        held = root["frozen_param_fragments"]
        name = next(name for name in held if held[name].numel())
        held[name] = held[name].to(torch.float64)

    error = refused(changed(FROZEN, tmp_path, "*model_states.pt", retype))
    assert (error.code, "fragments" in error.what) == ("zero-layout", True)


# ---- how shards make one tensor


COPIES, ROWS, SUBS = (
    {"tp_replicated_parameter_patterns": ["w"]}, {"parameter_with_row_parallelism_patterns": ["w"]},
    {"parameter_with_sub_params": [{"patterns": ["w"], "shape": (2, -1), "partition_dim": 0}]},
)  # fmt: skip
WIDTHS = {"universal_checkpoint_version": 0.4}
MISFITS: dict[str, tuple[Root, list[tuple[int, ...]]]] = {
    "at most 64 axes": (ROWS, [(1,) * 65] * 2),
    "every rank holds the whole": (COPIES, [(4, 2), (2, 4)]),
    "cut along axis 1": (ROWS, [(4, 2), (3, 2)]),
    "cut along axis 1, 2 + -1": (ROWS, [(4, 2), (8,)]),
    "sub-parameters of the form": (SUBS, [(4,), (4,)]),
    "sub-parameters of 3": ({"parameter_with_sub_params": [{"patterns": ["w"], "shape": (3, -1), "partition_dim": 0}]},
                            [(2, 2), (2, 2)]),
    "sub-parameters of (1, 2)": ({"parameter_with_sub_params": [{"patterns": ["w"], "shape": ((1, 2), -1),
                                                                "partition_dim": 0}]}, [(2, 2), (2, 2)]),
    "sub-parameters, and no widths": (SUBS | WIDTHS | {"sub_param_shard_widths": {"w": [[2], [2]]}}, [(4, 2), (4, 2)]),
    "cut along axis 0, 1 + 2": (SUBS | WIDTHS | {"sub_param_shard_widths": {"w": [[1, 2], [2, 2]]}}, [(4, 2), (4, 2)]),
    "sub-parameters, and no widths of theirs": (SUBS | WIDTHS, [(4, 2), (4, 2)]),
    "the 9 rows of the vocabulary": (COPIES | {"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 9},
                                     [(8, 2), (8, 2)]),
    "the 9 rows of the vocabulary, padded": (COPIES | {"vocabulary_parameter_patterns": ["w"],
                                                       "original_vocab_size": 9}, [(5000, 2), (5000, 2)]),
    "the 0 rows of the vocabulary": (COPIES | {"vocabulary_parameter_patterns": ["w"]}, [(8, 2), (8, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("stated", MISFITS)
def test_shapes_that_are_not_those_of_the_layout(stated: str) -> None:
    info, shapes = MISFITS[stated]
    with pytest.raises(sm.ShardmergeError) as caught:
        read_layouts(info, "here").layout("w", shapes)
    assert caught.value.code == "tensor-layout"
    assert stated in caught.value.expected


# ---- what an optimizer is taken along from


def test_a_moment_that_only_one_rank_has(tmp_path: Path) -> None:
    def lose(root: Root) -> None:
        moments(root)[0].pop("exp_avg")

    error = refused(changed(ZERO2, tmp_path, "*optim_states.pt", lose), view="exp_avg")
    assert (error.code, "exp_avg of group 0" in error.what) == ("no-moments", True)


def test_a_moment_of_fewer_numbers(tmp_path: Path) -> None:
    def cut(root: Root) -> None:
        state = moments(root)[0]
        state["exp_avg"] = state["exp_avg"][:-100].clone()

    assert refused(changed(ZERO2, tmp_path, "*optim_states.pt", cut), view="exp_avg").code == "no-moments"


def test_an_optimizer_that_keeps_more_than_adam(tmp_path: Path) -> None:
    def more(root: Root) -> None:
        state = moments(root)[0]
        state["max_exp_avg_sq"] = state["exp_avg"].clone()

    error = refused(changed(ZERO2, tmp_path, "*optim_states.pt", more), view="exp_avg")
    assert (error.code, "max_exp_avg_sq" in error.what) == ("no-moments", True)


def moments(root: Root) -> dict[int, Root]:
    found: dict[int, Root] = root["optimizer_state_dict"]["base_optimizer_state"]["state"]
    return found


# ---- facts that every file of a run states


def of_all(folder: Path) -> str:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(folder)
    assert {error.code for error in caught.value.each()} <= {"mixed-runs", "missing-rank"}
    return str(caught.value)


def state(root: Root) -> Root:
    found: Root = root["optimizer_state_dict"]
    return found


FACTS: list[tuple[str, Path, str, Callable[[Root], object]]] = [
    ("ZeRO stage", ZERO2, OPTIMS, lambda root: state(root).update(zero_stage=1)),
    ("world size", ZERO2, OPTIMS, lambda root: state(root).update(partition_count=[1])),
    ("optimizer step", ZERO2, OPTIMS, lambda root: moments(root)[0]["step"].add_(1)),
    ("ds_config", ZERO2, OPTIMS, lambda root: root["ds_config"].update(steps_per_print=7)),
    ("the optimizer's settings", ZERO2, OPTIMS,
     lambda root: state(root)["base_optimizer_state"]["param_groups"][0].update(lr=7.0)),
    ("DeepSpeed version", ZERO2, OPTIMS, lambda root: root.update(ds_version="0.18.0")),
    ("param_shapes", ZERO3, MODELS, lambda root: root["param_shapes"][0].update(more=torch.Size((1,)))),
    ("global_steps", ZERO3, MODELS, lambda root: root.update(global_steps=7)),
    ("skipped_steps", ZERO3, MODELS, lambda root: root.update(skipped_steps=1)),
    ("world size", ZERO3, MODELS, lambda root: root.update(dp_world_size=1)),
    ("ds_config", ZERO3, MODELS, lambda root: root["ds_config"].update(steps_per_print=7)),
    ("DeepSpeed version", ZERO3, MODELS, lambda root: root.update(ds_version="0.18.0")),
    ("ds_config", ZERO2, MODELS, lambda root: root["ds_config"].update(steps_per_print=7)),
    ("DeepSpeed version", ZERO2, MODELS, lambda root: root.update(ds_version="0.18.0")),
    ("world size", ZERO2, MODELS, lambda root: root.update(dp_world_size=1)),
    ("the ZeRO stage", ZERO2, MODELS, lambda root: root["ds_config"]["zero_optimization"].update(stage=1)),
]  # fmt: skip


@pytest.mark.parametrize("fact", range(len(FACTS)), ids=lambda n: f"{FACTS[n][0]} of {FACTS[n][1].name} {FACTS[n][2]}")
def test_a_file_that_states_something_else(fact: int, tmp_path: Path) -> None:
    what, case, names, change = FACTS[fact]
    assert f"differ in {what} [" in of_all(changed(case, tmp_path, names, change))


# ---- further kinds


def test_two_files_of_one_rank(tmp_path: Path) -> None:
    tag = changed(ZERO2, tmp_path, MODELS, lambda root: None)
    for path in tag.glob("bf16_zero_pp_rank_1*"):
        shutil.copy(path, path.with_name(path.name.removeprefix("bf16_")))
    assert "two files are those of rank 1" in of_all(tag)


def test_optimizer_files_of_more_ranks_than_there_were(tmp_path: Path) -> None:
    tag = changed(ZERO2, tmp_path, MODELS, lambda root: None)
    shutil.copy(next(tag.glob("*pp_rank_1_*")), tag / "bf16_zero_pp_rank_5_mp_rank_00_optim_states.pt")
    assert "there are more optimizer files than ranks" in of_all(tag)


def test_experts_whose_optimizer_is_in_files_that_are_gone(tmp_path: Path) -> None:
    """Up to 0.16 the model file says nothing of ZeRO's partitions."""
    tag = changed(GOLDEN / "parallel/v0_16_9_moe_z2_ep2_w4_bf16", tmp_path, MODELS, lambda root: None)
    for path in tag.glob("*zero_pp*"):
        path.unlink()
    assert "there are no optimizer files" in of_all(tag)


def test_a_frozen_parameter_of_another_size(tmp_path: Path) -> None:
    """Stage 2 has it whole; no partition has it."""

    def cut(root: Root) -> None:
        held = root["frozen_param_fragments"]
        name = next(iter(held))
        held[name] = held[name].flatten()[:-1].clone()

    error = refused(changed(GOLDEN / "zero/lora_z2_w2_bf16", tmp_path, MODELS, cut))
    assert (error.code, "another size than its shape" in error.what) == ("zero-layout", True)


def test_slices_of_a_parameter_that_the_model_has_in_another_size(tmp_path: Path) -> None:
    def turn(root: Root) -> None:
        module = root["module"]
        name = next(name for name in module if module[name].dim() == 2 and "expert" not in name)
        module[name] = module[name][:-1].clone()

    error = refused(changed(GOLDEN / "parallel/v0_16_9_moe_z2_ep2_w4_bf16", tmp_path, MODELS, turn))
    assert (error.code, "not in the model's files in their size" in error.what) == ("zero-layout", True)


def test_a_universal_pipeline_has_no_16_bit_module() -> None:
    save_dir = GOLDEN / "pipeline/universal_pp2_tied_z1_w2_bf16/ckpt"
    assert refused(save_dir, view="module").code == "no-module-view"


def test_a_stage_3_save_without_16_bit_weights_says_how_to_have_them(tmp_path: Path) -> None:
    error = refused(ZERO3 / "ckpt", view="module")
    assert (error.code, error.hint) == (
        "no-module-view",
        "leave --view out, and cast the fp32 weights: --dtype bfloat16",
    )
    sm.convert(ZERO3 / "ckpt", tmp_path / "out", options=sm.Options(dtype="bfloat16", sync=False))
    assert {entry.dtype.name for entry in sm.inspect(tmp_path / "out").entries.values()} == {"BF16"}


@pytest.mark.parametrize(("share", "differ"), [(0.4, False), (0.6, True)])
def test_a_small_tensor_of_another_save_is_known_among_many(share: float, differ: bool, tmp_path: Path) -> None:
    """Far less than a quarter of its file; of one tensor, up to half may differ."""

    def edit(root: Root) -> None:
        name = next(name for name, held in root["module"].items() if held.dim() == 2)
        flat = root["module"][name].flatten()
        flat[: int(share * flat.numel())] += 1

    tag = changed(ZERO2, tmp_path, MODELS, edit)
    if differ:
        error = refused(tag)
        assert (error.code, "sampled weights of the tensor" in error.found) == ("mixed-runs", True)
    else:
        assert "do not round to the 16-bit module" in " ".join(sm.inspect(tag).warnings)


def test_groups_of_an_optimizer_that_leave_one_out(tmp_path: Path) -> None:
    """Of each rank; all say the same, so they are of one run."""
    tag = changed(GOLDEN / "zero/frozen_in_groups_z2_w2_bf16", tmp_path, MODELS, lambda root: None)
    for path in tag.glob(OPTIMS):
        root = torch.load(path, weights_only=False)
        for group in state(root)["base_optimizer_state"]["param_groups"]:
            group["params"] = [0]
        torch.save(root, path)
    error = refused(tag, view="exp_avg")
    assert (error.code, "parameter groups number" in error.what) == ("no-moments", True)


def test_a_model_file_of_another_stage_is_no_module_either(tmp_path: Path) -> None:
    tag = changed(ZERO2, tmp_path, MODELS, lambda root: root["ds_config"]["zero_optimization"].update(stage=3))
    error = refused(tag, view="module")
    assert (error.code, "name of another ZeRO stage" in error.what) == ("mixed-runs", True)


def test_two_layers_of_experts_under_one_name(tmp_path: Path) -> None:
    """The files of the second layer hold what the first one's do."""
    tag = changed(GOLDEN / "parallel/moe_z2_ep2_w2_bf16", tmp_path, MODELS, lambda root: None)
    for path in sorted(tag.glob("layer_0_expert_*")):
        other = path.with_name(path.name.replace("layer_0", "layer_1"))
        torch.save(torch.load(path, weights_only=False), other)
    assert "two layers of experts have one name" in of_all(tag)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("expert_0_mp_rank_00_model_states.pt", "mixture-of-experts (MoE) of an early form"),
        ("layer_0_expert_0_mp_rank_01_model_states.pt", "tensor-parallel mixture-of-experts (MoE)"),
    ],
)
def test_experts_of_files_that_are_not_read(name: str, kind: str, tmp_path: Path) -> None:
    tag = changed(GOLDEN / "parallel/moe_z2_ep2_w2_bf16", tmp_path, MODELS, lambda root: None)
    shutil.copy(tag / "layer_0_expert_0_mp_rank_00_model_states.pt", tag / name)
    error = refused(tag)
    assert (error.code, error.found) == ("kind-not-yet", name)
    assert f"a {kind} DeepSpeed checkpoint" in error.what


def test_experts_without_data(tmp_path: Path) -> None:
    """All of them, so that none differs from the others."""
    tag = changed(GOLDEN / "parallel/moe_z0_ep2_w2_bf16", tmp_path, MODELS, lambda root: None)
    for path in tag.glob("layer_*_expert_*"):
        root = torch.load(path, weights_only=False)
        torch.save({name: torch.empty(0, dtype=held.dtype) for name, held in root.items()}, path)
    assert "a file of an expert has no data" in of_all(tag)


@pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda flats: flats.append(flats[0].clone()), "groups that param_shapes lists"),
        (lambda flats: flats.insert(0, torch.cat([flats.pop(0), torch.zeros(64)])), "hold"),
        (lambda flats: flats.insert(0, flats.pop(0)[:-64].clone()), "hold"),
        (lambda flats: flats.insert(0, flats.pop(0).repeat_interleave(2)[::2]), "not contiguous"),
        (lambda flats: flats.append(None), "the optimizer file has no"),
    ],
    ids=["a group more", "longer", "shorter", "strided", "none"],
)
def test_partitions_that_are_not_those_of_the_model_file(
    case: Path, change: Callable[[list[Any]], object], what: str, tmp_path: Path
) -> None:
    error = refused(changed(case, tmp_path, OPTIMS, lambda root: change(state(root)[flat_key(state(root))])))
    assert error.code == "zero-layout"
    assert what in error.what


# ---- tensor parallel ranks, universal checkpoints, settings


AUTOTP = GOLDEN / "parallel/autotp_z1_tp2_w2_bf16"


def of_second(root: Root, path: Path) -> Root:
    """What the files of the second tensor parallel rank hold; of others something that may be changed."""
    return root if "mp_rank_01" in path.name else {"ds_config": {}}


TENSOR_FACTS: dict[str, Callable[[Root, Path], object]] = {
    "ds_config": lambda root, path: of_second(root, path)["ds_config"].update(steps_per_print=7),
    "skipped_steps": lambda root, path: of_second(root, path).update(skipped_steps=1),
    "world size": lambda root, path: of_second(root, path).pop("dp_world_size", None),
    "DeepSpeed version": lambda root, path: of_second(root, path).update(ds_version="0.18.0"),
    "the ZeRO stage": lambda root, path: (
        root.update(ds_config=None),
        of_second(root, path).get("optimizer_state_dict", {}).update(zero_stage=2),
    ),
}


@pytest.mark.parametrize("what", TENSOR_FACTS)
def test_tensor_ranks_that_state_something_else(what: str, tmp_path: Path) -> None:
    tag = changed(AUTOTP, tmp_path, MODELS, lambda root: None)
    for path in tag.glob("*.pt"):
        root = torch.load(path, weights_only=False)
        TENSOR_FACTS[what](root, path)
        torch.save(root, path)
    assert f"the tensor parallel ranks are not of one run: they differ in {what} [" in of_all(tag)


def test_a_universal_pipeline_whose_order_is_mixed_up(tmp_path: Path) -> None:
    save_dir = shutil.copytree(GOLDEN / "pipeline/universal_pp2_z1_w4_bf16/ckpt", tmp_path / "ckpt")
    for path in save_dir.rglob(MODELS):
        root = torch.load(path, weights_only=False)
        root["ds_config"]["zero_optimization"]["round_robin_gradients"] = True
        torch.save(root, path)
    assert refused(save_dir).code == "wrong-universal"


def test_a_universal_checkpoint_that_lacks_a_moment(tmp_path: Path) -> None:
    save_dir = shutil.copytree(GOLDEN / "universal/bag_z2_w3_bf16/ckpt", tmp_path / "ckpt")
    sm.inspect(save_dir, view="exp_avg")
    next(save_dir.rglob("exp_avg.pt")).unlink()
    error = refused(save_dir, view="exp_avg")
    assert (error.code, "no exp_avg.pt for 1 of" in error.what) == ("no-moments", True)


def test_a_universal_checkpoint_whose_module_has_another_shape(tmp_path: Path) -> None:
    save_dir = shutil.copytree(GOLDEN / "universal/bag_z2_w3_bf16/ckpt", tmp_path / "ckpt")
    path = next(save_dir.rglob(MODELS))
    root = torch.load(path, weights_only=False)
    root["module"]["wide.weight"] = root["module"]["wide.weight"].reshape(-1)
    torch.save(root, path)
    assert "does not have the parameter 'wide.weight' in the shape" in refused(save_dir).what


def test_a_universal_checkpoint_that_says_no_steps(tmp_path: Path) -> None:
    save_dir = shutil.copytree(GOLDEN / "universal/bag_z2_w3_bf16/ckpt", tmp_path / "ckpt")
    for path in save_dir.rglob("one.weight/step.pt"):
        path.unlink()
    error = refused(save_dir, view="exp_avg")
    assert (error.code, "how often each weight was stepped" in error.what) == ("no-moments", True)


def test_a_setting_that_is_no_plain_value(tmp_path: Path) -> None:
    def put(root: Root) -> None:
        state(root)["base_optimizer_state"]["param_groups"][0]["lr"] = torch.tensor(0.01)

    tag = changed(ZERO2, tmp_path, MODELS, lambda root: None)
    for path in tag.glob(OPTIMS):
        root = torch.load(path, weights_only=False)
        put(root)
        torch.save(root, path)
    error = refused(tag, view="exp_avg")
    assert (error.code, "the setting lr of parameter group 0 is a" in error.what) == ("no-moments", True)


def test_moments_of_what_is_not_plain_zero() -> None:
    assert refused(AUTOTP / "ckpt", view="exp_avg").code == "no-moments"
    assert refused(GOLDEN / "pipeline/pp2_z1_w2_bf16/ckpt", view="exp_avg").code == "no-moments"


def test_more_tensor_ranks_than_any_run_has(tmp_path: Path) -> None:
    degrees = {"tp_degree": 10**9, "pp_degree": 1}
    tag = changed(AUTOTP, tmp_path, MODELS, lambda root: None)
    for path in tag.glob(MODELS):
        root = torch.load(path, weights_only=False)
        root["checkpoint_parallel_dimensions"].update(degrees)
        torch.save(root, path)
    assert "other model-parallel ranks than the run has" in of_all(tag)


def test_copies_of_one_element_that_differ(tmp_path: Path) -> None:
    tag = changed(GOLDEN / "parallel/autotp_fused_z1_tp2_w4_bf16", tmp_path, MODELS, lambda root: None)
    for rank, path in enumerate(sorted(tag.glob(MODELS))):
        root = torch.load(path, weights_only=False)
        root["module"]["scale"] = torch.full((1,), float(rank))
        torch.save(root, path)
    error = refused(tag)
    assert (error.code, "scale" in error.found) == ("mixed-ranks", True)


def test_an_expert_that_is_of_another_rank(tmp_path: Path) -> None:
    """Each of two parts has two of four experts, 0 and 1."""

    def change(root: Root) -> None:
        group = root["param_shapes"][1]
        name, shape = group.popitem()
        group[re.sub(r"experts\.\d+", "experts.2", name)] = shape

    error = refused(changed(GOLDEN / "parallel/moe_z2_ep2_w2_bf16", tmp_path, MODELS, change))
    assert error.what == "the parameters of group 1 are not those of the experts' files"


@pytest.mark.parametrize(("version", "more"), [("0.13.4", True), ("0.13.5", False), ("0.19.8", False)])
def test_the_step_that_early_versions_made_first(version: str, more: bool) -> None:
    root: dict[object, Any] = {"global_steps": 5, "skipped_steps": 2, "ds_version": version}
    claims = read_claims(root)
    assert claims.counts_to(3)
    assert claims.counts_to(4) == more
    assert not claims.counts_to(5)


@pytest.mark.parametrize(
    "text", ["^" + "a" * 1022 + "$b", "a" * 1025, "." + "a" * 1024, "a*b*c*d*e", "[z-a]", "(a)", "a|b"]
)
def test_patterns_that_are_not_read(text: str) -> None:
    with pytest.raises(sm.ShardmergeError) as caught:
        NamePatterns.of([text], "here")
    assert (caught.value.code, caught.value.where) == ("name-pattern", "here")


def test_patterns_that_take_more_steps_than_any() -> None:
    patterns = NamePatterns.of([".*a.*b.*c"], "here")
    assert patterns.find("abc") == [".*a.*b.*c"]
    with pytest.raises(sm.ShardmergeError) as caught:
        patterns.find("x" * 600)
    assert caught.value.code == "name-pattern"
