"""DeepSpeed's experts, tensor parallel ranks, hpZ and MiCS: real checkpoints against their truth, and what is changed.

Those of ``tests/golden/parallel`` were written by DeepSpeed 0.16.9 and 0.19.8; the truth is of the weights in memory.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardmerge as sm
from shardmerge.dtypes import DTYPES
from shardmerge.sources.deepspeed_checks import ONE_SAVE
from tests.conftest import GOLDEN, read_all, same_values, shardmerge
from tests.deepspeed_classes import deepspeed_classes
from tests.test_claims import Damage, Saved, is_truth, outcome

PARALLEL = sorted(path.parent for path in GOLDEN.glob("parallel/*/case.json"))
UNSAID = GOLDEN / "parallel" / "v0_16_9_autotp_z1_tp2_w2_bf16"
READ = [case for case in PARALLEL if case != UNSAID]
MOE = [case for case in READ if "moe" in case.name]
TENSOR = [case for case in READ if case.name.startswith(("autotp", "megatron"))]
OPTIMS = "*zero_pp*optim_states.pt"


@pytest.fixture(autouse=True)
def classes() -> Iterator[None]:
    with deepspeed_classes():
        yield


def case_of(name: str) -> Path:
    return GOLDEN / "parallel" / name


def tag_of(case: Path) -> Path:
    return case / "ckpt" / (case / "ckpt" / "latest").read_text().strip()


def stage_of(case: Path) -> int:
    return int(json.loads((case / "case.json").read_text())["stage"])


def truth_of(case: Path) -> dict[str, Any]:
    tensors = load_file(case / "truth.safetensors")
    return {name: (t.double() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def refusal(folder: Path, **options: Any) -> list[sm.ShardmergeError]:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(folder, **options)
    return list(caught.value.each())


def changed(case: Path, folder: Path, names: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the tag of a case, some of its files changed."""
    tag = shutil.copytree(tag_of(case), folder / "tag")
    paths = sorted(tag.glob(names))
    assert paths
    for path in paths:
        root = torch.load(path, weights_only=False)
        change(root)
        torch.save(root, path)
    return tag


# ---- real checkpoints


def test_the_folder_has_every_kind() -> None:
    words = " ".join(case.name for case in PARALLEL)
    assert len(READ) >= 17
    for kind in ("moe_z0", "moe_z1", "moe_z2", "autotp_z0", "autotp_z3", "megatron", "hpz", "mics", "v0_16_9_moe"):
        assert kind in words


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_every_tensor_has_the_bits_of_the_truth(case: Path) -> None:
    catalog = sm.inspect(case / "ckpt")
    truth = load_file(case / "truth.safetensors")
    assert is_truth(read_all(catalog), truth_of(case))
    assert {name: catalog[name].dtype.torch for name in truth} == {
        name: str(tensor.dtype).removeprefix("torch.") for name, tensor in truth.items()
    }


@pytest.mark.parametrize("case", [case for case in READ if stage_of(case) < 3], ids=lambda case: case.name)
def test_the_16_bit_view_is_the_truth_rounded(case: Path, tmp_path: Path) -> None:
    """It needs no optimizer file."""
    tag = shutil.copytree(tag_of(case), tmp_path / "tag", ignore=shutil.ignore_patterns("*optim_states.pt"))
    catalog = sm.inspect(tag, view="module")
    found = read_all(catalog)
    truth = load_file(case / "truth.safetensors")
    assert found.keys() == truth.keys()
    wide = {name for name in found if catalog[name].dtype.itemsize > 2}
    assert wide <= {"offset"}  # a buffer, which is in no optimizer
    for name, array in found.items():
        rounded = truth[name].to(getattr(torch, catalog[name].dtype.torch))
        assert same_values(array, rounded.double().numpy()), name


@pytest.mark.parametrize(
    "name",
    ["moe_z2_ep2_w2_bf16", "v0_16_9_moe_z2_ep2_w4_bf16", "autotp_fused_z1_tp2_w4_bf16", "megatron_z1_tp2_w4_bf16",
     "autotp_z3_tp2_w4_bf16"],
)  # fmt: skip
def test_a_conversion_writes_them(name: str, tmp_path: Path) -> None:
    case = case_of(name)
    sm.convert(case / "ckpt", tmp_path / "out", options=sm.Options(dtype=DTYPES["F32"], sync=False))
    assert is_truth(read_all(sm.inspect(tmp_path / "out")), truth_of(case))
    sm.verify(tmp_path / "out")


def test_any_file_stands_for_the_whole() -> None:
    for name in ("moe_z2_ep2_w2_bf16", "autotp_z1_tp2_w2_bf16"):
        case = case_of(name)
        for path in tag_of(case).iterdir():
            assert is_truth(read_all(sm.inspect(path)), truth_of(case)), path.name


def test_what_is_not_in_fp32_is_said() -> None:
    notes = sm.inspect(case_of("moe_z2_ep2_w2_bf16") / "ckpt").notes
    assert "2 tensors of experts have no fp32 masters (frozen): their 16-bit files are taken" in notes
    (warning,) = sm.inspect(case_of("moe_z0_ep2_w2_bf16") / "ckpt").warnings
    assert "16-bit weights are taken" in warning
    notes = sm.inspect(case_of("megatron_z1_tp2_w4_bf16") / "ckpt").notes
    assert "rows that pad the vocabulary are left out of 1 tensor(s)" in notes


def test_ranks_that_do_not_say_how_they_are_cut_are_refused() -> None:
    """AutoTP of 0.16 wrote two halves of each matrix, and nothing of which way they were cut."""
    for view in ("fp32", "module"):
        (error,) = refusal(UNSAID / "ckpt", view=view)
        assert error.code == "kind-not-yet"
        assert "universal_checkpoint_info" in error.found
        assert "save_16bit_model" in error.hint


def test_a_version_alone_says_nothing_of_shards(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        root["universal_checkpoint_info"] = {"universal_checkpoint_version": 0.2}

    tag = changed(case_of("autotp_z1_tp2_w2_bf16"), tmp_path, "*model_states.pt", change)
    assert [error.code for error in refusal(tag)] == ["kind-not-yet"]


# ---- files that are missing, cut, swapped


def damages(case: Path) -> Iterator[Damage]:
    saved = Saved(case.name, tag_of(case), case / "truth.safetensors", stage_of(case))
    files = saved.files()
    names = [name for name in files if not name.startswith("expp") or stage_of(case) == 0]
    for name in names:
        yield Damage("taken away", name, {n: d for n, d in files.items() if n != name}, (saved,))
        yield Damage("cut in half", name, {**files, name: files[name][: len(files[name]) // 2]}, (saved,))
    for kind in ("zero_pp_rank", "layer", "mp_rank"):
        mine = [name for name in names if name.removeprefix("bf16_").startswith(kind)]
        for one, two in pairwise(mine):
            if one.endswith(two[-20:]):
                yield Damage("swapped", one, {**files, one: files[two], two: files[one]}, (saved,))
                yield Damage("replaced by a neighbour", one, {**files, one: files[two]}, (saved,))


REFUSALS = {"missing-rank", "mixed-runs", "mixed-ranks", "zero-layout", "truncated-file", "damaged-zip", "not-torch"}


@pytest.mark.parametrize("case", [case for case in READ if stage_of(case)], ids=lambda case: case.name)
def test_what_is_damaged_is_refused(case: Path, tmp_path: Path) -> None:
    table = list(damages(case))
    assert len(table) >= 8
    for index, damage in enumerate(table):
        code = outcome(damage, tmp_path / str(index))
        assert code in REFUSALS, f"{code}: {damage.what}, {damage.touched}"


@pytest.mark.parametrize("view", ["fp32", "module"])
@pytest.mark.parametrize("case", MOE, ids=lambda case: case.name)
def test_a_model_without_an_expert_is_none(case: Path, view: Any, tmp_path: Path) -> None:
    tag = shutil.copytree(tag_of(case), tmp_path / "tag")
    (tag / "layer_0_expert_2_mp_rank_00_model_states.pt").unlink()
    (error,) = refusal(tag, view=view)
    assert error.code == "missing-rank"
    assert "layer_0_expert_2_mp_rank_00_model_states.pt" in error.what
    for path in tag.glob("layer_*"):
        path.unlink()
    assert refusal(tag, view=view)[0].code == "missing-rank"


@pytest.mark.parametrize("view", ["fp32", "module"])
@pytest.mark.parametrize("rank", [0, 1])
def test_half_of_a_tensor_parallel_run_is_no_model(rank: int, view: Any, tmp_path: Path) -> None:
    tag = shutil.copytree(tag_of(case_of("autotp_z1_tp2_w2_bf16")), tmp_path / "tag")
    for path in tag.glob(f"*mp_rank_{rank:02d}*"):
        path.unlink()
    (error,) = refusal(tag, view=view)
    assert error.code == "missing-rank"
    assert f"mp_rank_{rank:02d}_model_states.pt" in error.what


def test_a_data_rank_of_a_tensor_rank_is_named(tmp_path: Path) -> None:
    for name in ("autotp_z2_tp2_w4_bf16", "autotp_z3_tp2_w4_bf16"):
        tag = shutil.copytree(tag_of(case_of(name)), tmp_path / name)
        (gone,) = tag.glob("*zero_pp_rank_1_mp_rank_01_optim*")
        gone.unlink()
        (error,) = refusal(tag)
        assert error.code == "missing-rank"
        assert gone.name in error.found


def test_without_the_partitions_of_an_old_mixture_the_16_bit_files_are_offered(tmp_path: Path) -> None:
    """Its model file says nothing of ZeRO; the optimizer files of the experts do."""
    case = case_of("v0_16_9_moe_z2_ep2_w4_bf16")
    tag = shutil.copytree(tag_of(case), tmp_path / "tag", ignore=shutil.ignore_patterns(OPTIMS))
    text = shardmerge("convert", tag, tmp_path / "out", code=1).stderr
    assert "[missing-rank]" in text
    assert "--view module" in text
    shardmerge("convert", tag, tmp_path / "out", "--view", "module")


def test_mics_is_verified_by_what_the_optimizer_files_say(tmp_path: Path) -> None:
    case = case_of("v0_16_9_mics_z3_s2_w4_bf16")
    tag = changed(case, tmp_path, OPTIMS, lambda root: root["optimizer_state_dict"].update(partition_count=4))
    assert {error.code for error in refusal(tag)} == {"missing-rank", "mixed-runs"}
    tag = changed(
        case, tmp_path / "other", "*model*", lambda root: root["ds_config"]["zero_optimization"].pop("mics_shard_size")
    )
    assert {error.code for error in refusal(tag)} == {"missing-rank", "mixed-runs"}


# ---- experts that are not as they are said


def _moved(root: dict[str, Any]) -> None:
    for name in list(root):
        root[name.replace("experts.1.", "experts.3.")] = root.pop(name)


def _turned(root: dict[str, Any]) -> None:
    name = next(name for name, tensor in root.items() if tensor.dim() == 2)
    root[name] = root[name].t().contiguous()


def _config(root: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = root["ds_config"]
    return config


def _state(root: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = root["optimizer_state_dict"]
    return state


def _slices(root: dict[str, Any], group: int) -> dict[str, Any]:
    slices: dict[str, Any] = _state(root)["param_slice_mappings"][group]
    return slices


def _later(root: dict[str, Any]) -> None:
    for address in list(_slices(root, 1).values())[1:]:
        address.start += 1


NEW, OLD = "moe_z2_ep2_w2_bf16", "v0_16_9_moe_z2_ep2_w4_bf16"
EXPERT = "layer_0_expert_1_*"
MODEL = "mp_rank_00_model_states.pt"
EDITED: list[tuple[str, str, str, Callable[[dict[str, Any]], object], str]] = [
    ("more experts", NEW, MODEL, lambda root: root.update(num_experts=[4, 6]), "missing-rank"),
    ("fewer experts", NEW, MODEL, lambda root: root.update(num_experts=[4, 2]), "mixed-runs"),
    ("no experts", NEW, MODEL, lambda root: root.pop("num_experts"), "mixed-runs"),
    ("a million million experts", NEW, MODEL, lambda root: root.update(num_experts=[10**12, 4]), "mixed-runs"),
    ("a layer more", NEW, MODEL, lambda root: root.update(num_experts=[4, 4, 4]), "missing-rank"),
    ("fused experts", NEW, MODEL, lambda root: root.update(ds_autoep_layers=[{}]), "kind-not-yet"),
    ("ZeRO-3 of experts", NEW, MODEL, lambda root: _config(root)["zero_optimization"].update(stage=3), "kind-not-yet"),
    ("a tensor parallel run", NEW, MODEL, lambda root: root["checkpoint_parallel_dimensions"].update(tp_degree=2),
     "kind-not-yet"),
    ("a tensor less", NEW, EXPERT, lambda root: root.pop(next(iter(root))), "mixed-runs"),
    ("placeholders", NEW, EXPERT, lambda root: root.update({name: torch.empty(0) for name in root}), "mixed-runs"),
    ("no dict", NEW, EXPERT, lambda root: root.clear(), "mixed-runs"),
    ("a tensor turned", NEW, EXPERT, _turned, "mixed-runs"),
    ("an expert by another's names", NEW, EXPERT, _moved, "mixed-runs"),
    ("another expert's names", "moe_z0_ep2_w2_bf16", EXPERT, _moved, "mixed-runs"),
    ("an expert of another step", NEW, EXPERT, lambda root: [t.add_(1) for t in root.values()], "mixed-runs"),
    ("experts of one rank", NEW, OPTIMS, lambda root: _state(root).update(partition_count=[2, 2]), "zero-layout"),
    ("three ranks of two", NEW, OPTIMS, lambda root: _state(root).update(partition_count=[2, 3]), "mixed-runs"),
    ("no counts", NEW, OPTIMS, lambda root: _state(root).pop("partition_count"), "zero-layout"),
    ("an expert's name gone", NEW, MODEL, lambda root: root["param_shapes"][1].popitem(), "zero-layout"),
    ("experts beside each other", "moe_z1_ep2_w4_bf16", "*zero*|mp*",
     lambda root: _config(root).update(use_data_before_expert_parallelism=True), "mixed-runs"),
    ("experts not beside each other", "moe_z2_data_first_w4_bf16", "*zero*|mp*",
     lambda root: _config(root).pop("use_data_before_expert_parallelism"), "mixed-runs"),
    ("slices that do not meet", OLD, OPTIMS, _later, "zero-layout"),
    ("a slice less", OLD, OPTIMS, lambda root: _slices(root, 1).popitem(), "zero-layout"),
    ("no slices", OLD, OPTIMS, lambda root: _state(root).pop("param_slice_mappings"), "zero-layout"),
    ("other slices in a rank", OLD, "*zero_pp_rank_1_*", lambda root: _slices(root, 1).popitem(), "zero-layout"),
    ("an order that is not written", OLD, OPTIMS,
     lambda root: _config(root)["zero_optimization"].update(round_robin_gradients=True), "zero-layout"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "name", "files", "change", "code"), EDITED, ids=[row[0] for row in EDITED])
def test_experts_are_compared_with_what_is_said_of_them(
    what: str, name: str, files: str, change: Callable[[dict[str, Any]], object], code: str, tmp_path: Path
) -> None:
    tag = tmp_path / "tag"
    shutil.copytree(tag_of(case_of(name)), tag)
    for pattern in files.split("|"):
        paths = sorted(tag.glob(pattern))
        assert paths
        for path in paths:
            root = torch.load(path, weights_only=False)
            change(root)
            torch.save(root, path)
    assert code in {error.code for error in refusal(tag)}, what


def test_a_parameter_that_no_expert_has_is_named(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        group = root["param_shapes"][1]
        group["moes.0.deepspeed_moe.experts.deepspeed_experts.0.7.bias"] = group.popitem()[1]

    (error,) = refusal(changed(case_of(NEW), tmp_path, MODEL, change))
    assert error.what == "the parameters of group 1 are not those of the experts' files"
    assert error.hint == ONE_SAVE
    assert "deepspeed_experts.0.7.bias" in error.found


# ---- shards that are not as they are said


def _info(root: dict[str, Any]) -> dict[str, Any]:
    info: dict[str, Any] = root["universal_checkpoint_info"]
    return info


def _map(root: dict[str, Any], name: str = "o_proj") -> dict[str, Any]:
    maps = _info(root)["affine_map"]["params"]
    found: dict[str, Any] = maps[next(pattern for pattern in maps if name in pattern)]
    return found


def _piece(root: dict[str, Any], rank: int = 1, name: str = "o_proj") -> dict[str, Any]:
    piece: dict[str, Any] = _map(root, name)["ranks"][rank]["pieces"][0]
    return piece


def _patterns(root: dict[str, Any], kind: str) -> list[Any]:
    found: list[Any] = _info(root)[kind]
    return found


AUTOTP, MEGATRON = "autotp_z1_tp2_w2_bf16", "megatron_z1_tp2_w4_bf16"
ROWS, COPIES = "parameter_with_row_parallelism_patterns", "tp_replicated_parameter_patterns"
HALVES, SUBS, WORDS = (
    "parameter_with_2_sub_params_cat_dim_0", "parameter_with_sub_params", "vocabulary_parameter_patterns",
)  # fmt: skip
LIES: list[tuple[str, str, Callable[[dict[str, Any]], object], str]] = [
    ("a whole with more rows", AUTOTP, lambda root: _map(root).update(logical_shape=[9, 8]), "box-hole tensor-layout"),
    ("a whole of other axes", AUTOTP, lambda root: _map(root).update(logical_shape=[64]), "tensor-layout"),
    ("a shard of another shape", AUTOTP, lambda root: _map(root)["ranks"][1].update(shard_shape=[4, 8]),
     "tensor-layout"),
    ("parts that overlap", AUTOTP, lambda root: _piece(root).update(source=[0, [8, 1]]), "box-hole"),
    ("parts that half overlap", AUTOTP, lambda root: _piece(root).update(source=[3, [8, 1]]), "box-overlap"),
    ("a part beyond the whole", AUTOTP, lambda root: _piece(root).update(source=[6, [8, 1]]), "tensor-layout"),
    ("a part that is turned", AUTOTP, lambda root: _piece(root).update(source=[4, [1, 8]]), "tensor-layout"),
    ("a part of no numbers", AUTOTP, lambda root: _piece(root).update(source=None), "tensor-layout"),
    ("a part of a shard alone", AUTOTP, lambda root: _piece(root).update(shape=[4, 4]), "box-hole"),
    ("a rank less", AUTOTP, lambda root: _map(root)["ranks"].pop(1), "tensor-layout"),
    ("a factor", AUTOTP, lambda root: _piece(root).update(scale=0.5), "kind-not-yet"),
    ("a layout without a form", AUTOTP,
     lambda root: _info(root)["autotp_unsupported_parameter_patterns"].update({r"^lm_head\.weight$": "blocks"}),
     "kind-not-yet"),
    ("a map of tomorrow", AUTOTP, lambda root: _info(root)["affine_map"].update(version=2), "tensor-layout"),
    ("a cut matrix that is no copy", AUTOTP,
     lambda root: _map(root, "q_proj").update(logical_shape=[4, 8], ranks={
         rank: {"shard_shape": [4, 8], "pieces": [
             {"shape": [4, 8], "source": [0, [8, 1]], "dest": [0, [8, 1]], "locations": [0, 1]}]} for rank in (0, 1)}),
     "mixed-ranks"),
    ("a cut vector that is no copy", MEGATRON,
     lambda root: _patterns(root, COPIES).append(r"\d+.self_attention.query_key_value.bias"), "mixed-ranks"),
    ("a vector cut along columns", MEGATRON,
     lambda root: _patterns(root, ROWS).append(r"\d+.self_attention.query_key_value.bias"), "tensor-layout"),
    ("two patterns of a kind", MEGATRON, lambda root: _patterns(root, COPIES).append(r"2.input_layernorm.bias"),
     "tensor-layout"),
    ("an average", MEGATRON,
     lambda root: _info(root).update(parameter_to_average_patterns=[r"\d+.input_layernorm.weight"]), "kind-not-yet"),
    ("halves of a vector of odd rows", MEGATRON,
     lambda root: (_patterns(root, COPIES).remove(r"\d+.input_layernorm.bias"),
                   _patterns(root, SUBS).append({"patterns": [r"\d+.input_layernorm.bias"], "shape": (3,),
                                                 "partition_dim": 0})), "tensor-layout"),
    ("matrices of other sizes", MEGATRON, lambda root: _patterns(root, SUBS)[0].update(shape=((8, 4, 6), -1)),
     "tensor-layout"),
    ("matrices along an axis that is not there", MEGATRON,
     lambda root: _patterns(root, SUBS)[0].update(partition_dim=2), "tensor-layout"),
    ("matrices without widths", MEGATRON, lambda root: _info(root).update(universal_checkpoint_version=0.4),
     "tensor-layout"),
    ("a vocabulary of more words", MEGATRON, lambda root: _info(root).update(original_vocab_size=37), "tensor-layout"),
    ("a vocabulary of no words", MEGATRON, lambda root: _info(root).pop("original_vocab_size"), "tensor-layout"),
    ("a pattern that takes for ever", MEGATRON, lambda root: _patterns(root, ROWS).append("((\\d+)+)+$"),
     "name-pattern"),
    ("a million million matrices", MEGATRON, lambda root: _patterns(root, SUBS)[0].update(shape=(10**12, -1)),
     "tensor-layout"),
    ("a thousand axes", AUTOTP, lambda root: _map(root).update(logical_shape=[1] * 1000), "tensor-layout"),
    ("a table of positions", MEGATRON, lambda root: _info(root).update(original_vocab_size=-5), "tensor-layout"),
    ("nothing of shards", MEGATRON, lambda root: [_info(root).pop(key) for key in (ROWS, COPIES)], "kind-not-yet"),
    ("a stage of a pipeline", MEGATRON,
     lambda root: root.update(checkpoint_parallel_dimensions={"pp_degree": 2, "tp_degree": 1}), "missing-layer"),
    ("one rank", AUTOTP, lambda root: root["checkpoint_parallel_dimensions"].update(tp_degree=1), "mixed-runs"),
    ("three ranks", AUTOTP, lambda root: root["checkpoint_parallel_dimensions"].update(tp_degree=3), "missing-rank"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "name", "change", "code"), LIES, ids=[row[0] for row in LIES])
def test_shards_are_compared_with_what_is_said_of_them(
    what: str, name: str, change: Callable[[dict[str, Any]], object], code: str, tmp_path: Path
) -> None:
    begun = time.process_time()
    tag = changed(case_of(name), tmp_path, "*model_states.pt", change)
    assert {error.code for error in refusal(tag)} <= set(code.split()), what
    assert time.process_time() - begun < 2


ONE_RANK: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("another step", lambda root: root.update(global_steps=9), "mixed-runs"),
    ("another map", lambda root: _piece(root).update(scale=2.0), "mixed-runs"),
    ("another setting", lambda root: _config(root).update(steps_per_print=7), "mixed-runs"),
    ("a name less", lambda root: (root["param_shapes"][0].popitem(), root["module"].popitem()), "zero-layout"),
    ("a name turned", lambda root: root["module"].update(
        {"model.norm.other": root["module"].pop("model.norm.weight")}), "mixed-ranks"),
    ("a type of its own", lambda root: root.update(
        buffer_names=["more"], module=root["module"] | {"more": torch.ones(2)}), "mixed-ranks"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "change", "code"), ONE_RANK, ids=[row[0] for row in ONE_RANK])
def test_tensor_ranks_are_compared_with_each_other(
    what: str, change: Callable[[dict[str, Any]], object], code: str, tmp_path: Path
) -> None:
    tag = changed(case_of(AUTOTP), tmp_path, "mp_rank_01_model_states.pt", change)
    assert code in {error.code for error in refusal(tag)}, what


def test_the_patterns_say_what_the_maps_say(tmp_path: Path) -> None:
    """An older reader of the same checkpoint goes by the patterns alone."""
    for name in ("autotp_z1_tp2_w2_bf16", "autotp_z3_tp2_w4_bf16", "autotp_fused_z1_tp2_w4_bf16"):
        case = case_of(name)
        tag = changed(case, tmp_path / name, "*model_states.pt", lambda root: _info(root).pop("affine_map"))
        assert is_truth(read_all(sm.inspect(tag)), truth_of(case)), name


def test_names_of_buffers_that_are_none_are_passed_over(tmp_path: Path) -> None:
    case = case_of("autotp_fused_z1_tp2_w4_bf16")
    tag = changed(case, tmp_path, "mp_rank*", lambda root: root["buffer_names"].append([{}]))
    assert is_truth(read_all(sm.inspect(tag)), truth_of(case))


def test_buffers_are_copies_of_one_another(tmp_path: Path) -> None:
    case = case_of("autotp_fused_z1_tp2_w4_bf16")
    assert sm.inspect(case / "ckpt")["scale"].shape == ()
    tag = changed(case, tmp_path, "mp_rank_01_model*", lambda root: root["module"]["scale"].add_(1))
    (error,) = refusal(tag)
    assert (error.code, "scale" in error.found) == ("mixed-ranks", True)


def test_a_shard_of_another_type_is_refused(tmp_path: Path) -> None:
    case = case_of("autotp_fused_z1_tp2_w4_bf16")

    def change(root: dict[str, Any]) -> None:
        root["module"]["scale"] = root["module"]["scale"].float()

    (error,) = refusal(changed(case, tmp_path, "mp_rank_01_model*", change))
    assert (error.code, "of several types" in error.what) == ("mixed-ranks", True)


def test_a_tie_of_one_rank_alone_is_refused(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        root["shared_params"].clear()
        root["module"]["lm_head.weight"] = root["module"]["lm_head.weight"].clone()

    tag = changed(case_of("autotp_tied_z1_tp2_w2_bf16"), tmp_path, "mp_rank_01_model*", change)
    (error,) = refusal(tag)
    assert (error.code, "lm_head.weight" in error.found) == ("mixed-ranks", True)
