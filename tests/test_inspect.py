"""What `inspect` shows: a tree of patterns that adds up, the names that a template matches, and all of them."""

from __future__ import annotations

import json
import re
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import GOLDEN, shardmerge
from tests.terminal import in_terminal, plain

DOCS = Path(__file__).parent.parent / "docs"
XTUNER = GOLDEN / "xtuner" / "frozen_z2" / "work_dirs" / "iter_2.pth"
MIXTRAL = GOLDEN / "layouts" / "torch_dist_mixtral_ep2"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three layers, the last of which has another shape and another type; head and embedding are one tensor."""
    tensors = {"model.embed.weight": torch.ones(10, 4), "model.norm.weight": torch.ones(4)}
    for layer in range(8):
        tensors[f"model.layers.{layer}.q_proj.weight"] = torch.ones(4, 4)
        tensors[f"model.layers.{layer}.k_proj.weight"] = torch.ones(4, 4)
        tensors[f"model.layers.{layer}.norm.weight"] = torch.ones(4)
    tensors["model.layers.7.k_proj.weight"] = torch.ones(2, 4)
    tensors["model.layers.7.norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    state = tensors | {"head.weight": tensors["model.embed.weight"]}
    torch.save(state, tmp_path / "model.pt")
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_tree_that_adds_up(model: Path) -> None:
    assert shardmerge("inspect", model / "model.pt").stdout == (
        "torch zip: 26 tensors, 1 tied, 324 parameters, 1.29 KB\n"
        "\n"
        "model                        26 tensors      324  1.29 KB\n"
        "  embed.weight                  [10, 4] F32   40    160 B\n"
        "  norm.weight                   [4] F32        4     16 B\n"
        "  layers.0-7.q_proj.weight  8 x [4, 4] F32   128    512 B\n"
        "  layers.0-6                 14 tensors      140    560 B\n"
        "    k_proj.weight           7 x [4, 4] F32   112    448 B\n"
        "    norm.weight             7 x [4] F32       28    112 B\n"
        "  layers.7                    2 tensors       12     40 B\n"
        "    k_proj.weight               [2, 4] F32     8     32 B\n"
        "      ^ differs, others: [4, 4] F32\n"
        "    norm.weight                 [4] BF16       4      8 B\n"
        "      ^ differs, others: [4] F32\n"
        "head.weight: tied to model.embed.weight\n"
    )


def test_parameters_are_those_that_safetensors_counts(model: Path) -> None:
    with safe_open(model / "model.safetensors", "pt") as file:
        names = list(file.keys())
        counted = sum(file.get_tensor(name).numel() for name in names)
    found = json.loads(shardmerge("inspect", model / "model.safetensors", "--json").stdout)
    assert found["parameters"] == counted
    assert {row["name"] for row in found["tensors"]} == set(names)


def test_a_template_is_that_of_a_mapping(model: Path) -> None:
    whole = ("inspect", model / "model.pt")
    found = json.loads(shardmerge(*whole, "model.layers.{i}.{p:q_proj|norm}.weight", "head.{x}", "--json").stdout)
    assert [row["name"] for row in found["tensors"]] == [
        *(f"model.layers.{i}.{p}.weight" for i in range(8) for p in ("q_proj", "norm")), "head.weight"
    ]  # fmt: skip
    assert (found["parameters"], found["aliases"]) == (8 * 16 + 8 * 4, {"head.weight": "model.embed.weight"})
    shown = shardmerge(*whole, "{rest...}.k_proj.weight").stdout
    assert shown.startswith("torch zip: 8 of 26 tensors, 120 parameters, 480 B\n")
    assert "norm" not in shown


def test_flat_lists_every_tensor_and_where_it_is(model: Path) -> None:
    lines = shardmerge("inspect", model / "model.pt", "--flat", "{a...}.norm.weight", "head.weight").stdout.splitlines()
    assert lines[2].split() == ["tensor", "dtype", "shape", "bytes", "found", "in"]
    assert [line.split()[0] for line in lines[3:]] == [
        "model.norm.weight", *(f"model.layers.{i}.norm.weight" for i in range(8)), "head.weight"
    ]  # fmt: skip
    assert lines[-1].endswith("tied to model.embed.weight")


@pytest.mark.parametrize("template", ["model.layers", "model.layers.0.q_prj.weight", "other"])
def test_a_template_that_matches_nothing(model: Path, template: str) -> None:
    done = shardmerge("inspect", model / "model.pt", template, code=2)
    assert "[unknown-tensor]" in done.stderr
    assert done.stdout == ""
    hint = done.stderr.split("hint: ")[1]
    if template == "model.layers":
        assert "24 of 26 tensors" in shardmerge("inspect", model / "model.pt", hint.split("`")[1]).stdout
    elif template == "other":
        assert "26 tensors" in shardmerge(*hint.split("`")[1].split()[1:]).stdout
    else:
        near = hint.removeprefix("near names: ").split(", ")[0]
        assert "1 of 26 tensors" in shardmerge("inspect", model / "model.pt", near).stdout


def test_what_is_no_template(model: Path) -> None:
    assert "[unpaired-brace]" in shardmerge("inspect", model / "model.pt", "model.{i", code=1).stderr


def test_flat_and_json_are_two_answers(model: Path) -> None:
    assert "[no-effect]" in shardmerge("inspect", model / "model.pt", "--flat", "--json", code=2).stderr


@pytest.mark.parametrize("case", [XTUNER, MIXTRAL / "source"], ids=["xtuner", "mixtral"])
def test_a_terminal_of_80_columns_is_enough(case: Path) -> None:
    wide = shardmerge("inspect", case).stdout.splitlines()
    narrow = plain(in_terminal("inspect", case, columns=72)).splitlines()
    assert max(map(len, wide[3:])) > 72
    assert max(map(len, narrow[3:])) <= 72
    assert " ".join(narrow).split() == " ".join(wide).split()
    assert plain(in_terminal("inspect", case, columns=200)).splitlines() == wide


LLAMA_3_8B = {"hidden": 4096, "intermediate": 14336, "layers": 32, "vocabulary": 128256, "kv": 1024}


def write_llama(path: Path, hidden: int, intermediate: int, layers: int, vocabulary: int, kv: int) -> None:
    """Writes the header of a Llama in bfloat16, and a hole in the place of its data."""
    square, narrow = [hidden, hidden], [kv, hidden]
    of_layer = {"self_attn.q_proj": square, "self_attn.k_proj": narrow, "self_attn.v_proj": narrow}
    of_layer |= {"self_attn.o_proj": square, "mlp.gate_proj": [intermediate, hidden]}
    of_layer |= {"mlp.up_proj": [intermediate, hidden], "mlp.down_proj": [hidden, intermediate]}
    of_layer |= {"input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    shapes |= {f"model.layers.{i}.{one}.weight": shape for i in range(layers) for one, shape in of_layer.items()}
    shapes |= {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def shown_by(page: str, command: str) -> list[str]:
    """Returns what a page shows as the output of a command."""
    text = (DOCS / page).read_text("utf-8")
    (block,) = re.findall(rf"\$ {re.escape(command)}\n(.*?)```", text, re.DOTALL)
    return str(block).splitlines()


def test_the_first_page_shows_what_is_printed() -> None:
    command = "shardmerge inspect work_dirs/llava/iter_5198.pth"
    assert shown_by("index.md", command) == shardmerge("inspect", XTUNER).stdout.splitlines()


def test_the_commands_page_shows_what_is_printed(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.safetensors", **LLAMA_3_8B)
    printed = shardmerge("inspect", tmp_path / "model.safetensors").stdout.splitlines()
    command = "shardmerge inspect models/Meta-Llama-3-8B-Instruct"
    assert shown_by("reference/commands.md", command) == printed
    template = "model.layers.{i}.mlp.{rest...}"
    printed = shardmerge("inspect", tmp_path / "model.safetensors", template).stdout.splitlines()
    assert shown_by("reference/commands.md", f"{command} '{template}'") == printed
