"""Single files of trainers: names with wrappers' words, and several state dicts in one file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

import shardmerge as sm
from shardmerge.tensors.wrapped_names import unwrapping_rules
from tests.conftest import read_entry, shardmerge

FSDP = "_fsdp_wrapped_module."


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(2, 3)


def raw_state(module: nn.Module, front: str = "") -> dict[str, torch.Tensor]:
    """Parameters by the names that they have inside of wrappers, which clean their own state dicts."""
    return {f"{front}{name}": tensor.detach() for name, tensor in module.named_parameters()}


def checkpointed(model: Model) -> dict[str, torch.Tensor]:
    model.layers = nn.ModuleList(CheckpointWrapper(layer) for layer in model.layers)
    return raw_state(model)


def nested(model: Model) -> dict[str, torch.Tensor]:
    """FSDP around the whole, the first layer and in it the attention alone, which is checkpointed as well."""
    model.layers[0].attention = CheckpointWrapper(model.layers[0].attention)  # type: ignore[union-attr]
    names = raw_state(model)
    return {f"{FSDP}{name}".replace("layers.0.", f"layers.0.{FSDP}"): tensor for name, tensor in names.items()}


WRAPPED: dict[str, Callable[[Model], dict[str, torch.Tensor]]] = {
    "compiled": lambda model: torch.compile(model).state_dict(),  # type: ignore[attr-defined]
    "data parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled and data parallel": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),  # type: ignore[arg-type]
    "checkpointed layers": checkpointed,
    "fsdp": lambda model: raw_state(model, FSDP),
    "nested": nested,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
@pytest.mark.parametrize("way", WRAPPED)
def test_the_mapping_of_the_note_takes_the_words_off(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Model()
    truth = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(WRAPPED[way](model), "model.pt")
    note = next(note for note in sm.inspect("model.pt").notes if "wrapped model" in note)
    rules = re.findall(r"`([^`]+: (?:src:|\[)[^`]+)`", note)
    text = "shardmerge: 1\nsources:\n  src: model.pt\noutput:\n  path: out\ntensors:\n"
    Path("mapping.yaml").write_text(text + "".join(f"  {rule}\n" for rule in rules))
    shardmerge("run", "mapping.yaml", "--no-sync", "-q")
    found = load_file("out/model.safetensors")
    assert set(found) == set(truth)
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())


def test_names_that_only_look_wrapped_are_left_alone() -> None:
    assert unwrapping_rules(["module.a", "other.b"]) == ((), ())
    assert unwrapping_rules(["a_orig_mod.b", "modules.c"]) == ((), ())
    assert unwrapping_rules([]) == ((), ())
    assert unwrapping_rules(["_orig_mod.a", "a"]) == (("_orig_mod.",), ())  # two copies of one name


def test_names_that_somebody_made_up() -> None:
    numbers = ".".join(map(str, range(40)))
    words, rules = unwrapping_rules([f"_orig_mod.{numbers}.w", "a._orig_mod.b"])
    assert len(rules) == 2
    assert "{n36:int}" in rules[0]
    assert unwrapping_rules(["_orig_mod.{rest...}", "_orig_mod.a: b"]) == (words, ())
    assert unwrapping_rules(["module." * 500 + "w"])[0] == ("module.",) * 4
    assert unwrapping_rules([f"{n}a._orig_mod.w" for n in range(20_000)]) == (words, ())


def test_a_note_has_room_for_so_many_rules() -> None:
    words, rules = unwrapping_rules(["x._orig_mod.a", *(f"block{n}.w" for n in range(50))])
    assert (words, rules) == (("_orig_mod.",), ())


def test_another_model_in_the_file_is_named_and_can_be_chosen(tmp_path: Path) -> None:
    moments = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
    state = {"model": {"w": torch.ones(2)}, "ema": {"shadow": {"w": torch.zeros(2)}}, "optimizer": moments}
    torch.save(state, tmp_path / "last.pt")
    catalog = sm.inspect(tmp_path / "last.pt")
    assert read_entry(catalog["w"]).tolist() == [1.0, 1.0]
    warning = next(warning for warning in catalog.warnings if "ema.shadow" in warning)
    assert "optimizer" not in warning
    other = sm.inspect(tmp_path / "last.pt", root="ema.shadow")
    assert read_entry(other["w"]).tolist() == [0.0, 0.0]
    assert other.warnings == ()


def test_a_file_of_lightning(tmp_path: Path) -> None:
    """What ``Trainer.save_checkpoint`` writes: the model under `state_dict`, an average that a callback keeps."""
    state = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.6.1",
        "state_dict": {"model.w": torch.ones(2), "loss.scale": torch.ones(1)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"EMA": {"ema": {"model.w": torch.zeros(2)}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
        "lr_schedulers": [],
    }
    torch.save(state, tmp_path / "last.ckpt")
    catalog = sm.inspect(tmp_path / "last.ckpt")
    assert set(catalog.names()) == {"model.w", "loss.scale"}
    assert any("callbacks.EMA.ema" in warning for warning in catalog.warnings)
    assert read_entry(sm.inspect(tmp_path / "last.ckpt", root="callbacks.EMA.ema")["model.w"]).tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
@pytest.mark.parametrize(
    "wrap",
    [torch.nn.DataParallel, torch.compile, lambda model: torch.nn.DataParallel(torch.compile(model))],
    ids=["data-parallel", "compiled", "both"],
)
def test_a_conversion_that_keeps_a_wrappers_prefix_says_how_to_remove_it(
    wrap: Callable[[torch.nn.Module], torch.nn.Module], tmp_path: Path
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    torch.save(wrap(model).state_dict(), tmp_path / "w.pth")
    done = shardmerge("convert", tmp_path / "w.pth", tmp_path / "kept", "--quiet")
    advice = re.search(r"^warning: .*: to remove it add ((?:--strip \S+ ?)+)$", done.stderr, re.MULTILINE)
    assert advice is not None
    again = shardmerge("convert", tmp_path / "w.pth", tmp_path / "own", "--quiet", *advice[1].split())
    assert again.stderr == ""
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == model.state_dict().keys()
