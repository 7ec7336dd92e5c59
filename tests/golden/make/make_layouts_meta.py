"""Makes the golden Meta checkpoints (consolidated.NN.pth + params.json) and their Hugging Face truth.

    python make_layouts_meta.py --out DIR [--only NAME ...]

The shards are cut as Meta's own model code cuts them (fairscale): wq, wk, wv, w1, w3 and output are
ColumnParallelLinear (dim 0), wo and w2 are RowParallelLinear (dim 1), norms are on every rank. tok_embeddings is
ParallelEmbedding (dim 1) in Llama 1 and 2, VocabParallelEmbedding (dim 0) in Llama 3. The truth is what `write_model`
of transformers' own convert_llama_weights_to_hf.py saves: run as it is, with the sizes in params.json alone changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tempfile

import torch
from layouts import HIDDEN, LAYERS, VOCAB, all_distinct, fresh, is_norm, keep_only, random_tensor, versions, write_case
from layouts import write_config
from safetensors.torch import load_file


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    generation: str  # "1", "2" or "3"
    ranks: int
    heads: int
    kv_heads: int | None = None
    one_storage: bool = False  # the tensors of a file are views into one storage

    @property
    def embedding_dim(self) -> int:
        return 0 if self.generation == "3" else 1


CASES = (
    Case("meta_llama2_tp1_mha", "2", 1, 4),
    Case("meta_llama2_tp2_mha", "2", 2, 4, one_storage=True),
    Case("meta_llama2_tp2_gqa", "2", 2, 4, 2),
    Case("meta_llama2_tp4_gqa", "2", 4, 8, 4, one_storage=True),
    Case("meta_llama3_tp1_gqa", "3", 1, 4, 2),
    Case("meta_llama3_tp2_gqa", "3", 2, 4, 2),
    Case("meta_llama3_tp4_gqa", "3", 4, 8, 4),
    Case("meta_llama3_tp2_mha", "3", 2, 4, 4),
)
COLUMN = ("wq", "wk", "wv", "w1", "w3", "output")
ROW = ("wo", "w2")


def params_of(case: Case) -> dict[str, object]:
    """params.json with the keys that this generation's files have; Llama 2 leaves the vocabulary to the tokenizer."""
    params: dict[str, object] = {"dim": HIDDEN, "multiple_of": 32, "n_heads": case.heads, "n_layers": LAYERS}
    params |= {"norm_eps": 1e-5, "vocab_size": -1}
    if case.kv_heads is not None:
        params |= {"n_kv_heads": case.kv_heads, "ffn_dim_multiplier": 1.3}
    if case.generation == "3":
        params |= {"vocab_size": VOCAB, "rope_theta": 500000.0}
    return params


def whole(case: Case, intermediate: int) -> dict[str, torch.Tensor]:
    kv = HIDDEN // case.heads * (case.kv_heads or case.heads)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (HIDDEN, HIDDEN),
            f"layers.{layer}.attention.wk.weight": (kv, HIDDEN),
            f"layers.{layer}.attention.wv.weight": (kv, HIDDEN),
            f"layers.{layer}.attention.wo.weight": (HIDDEN, HIDDEN),
            f"layers.{layer}.feed_forward.w1.weight": (intermediate, HIDDEN),
            f"layers.{layer}.feed_forward.w2.weight": (HIDDEN, intermediate),
            f"layers.{layer}.feed_forward.w3.weight": (intermediate, HIDDEN),
            f"layers.{layer}.attention_norm.weight": (HIDDEN,),
            f"layers.{layer}.ffn_norm.weight": (HIDDEN,),
        }
    shapes |= {"norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    return {
        name: random_tensor(f"{case.name}/{name}", shape, torch.bfloat16, is_norm(name))
        for name, shape in shapes.items()
    }


def dim_of(case: Case, name: str) -> int | None:
    leaf = name.split(".")[-2]
    if leaf == "tok_embeddings":
        return case.embedding_dim
    return 0 if leaf in COLUMN else 1 if leaf in ROW else None


def shard(case: Case, state: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    parts = {}
    for name, tensor in state.items():
        dim = dim_of(case, name)
        parts[name] = (tensor if dim is None else tensor.chunk(case.ranks, dim)[rank]).clone()
    head = HIDDEN // case.heads
    theta = 500000.0 if case.generation == "3" else 10000.0
    parts["rope.freqs"] = (1.0 / theta ** (torch.arange(0, head, 2).float() / head)).to(torch.bfloat16)
    if not case.one_storage:
        return parts
    flat = torch.cat([part.flatten() for part in parts.values()])
    sizes = [part.numel() for part in parts.values()]
    pieces = flat.split(sizes)
    return {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}


def make(case: Case, out: pathlib.Path) -> None:
    from transformers.models.llama.convert_llama_weights_to_hf import compute_intermediate_size, write_model

    params = params_of(case)
    intermediate = compute_intermediate_size(HIDDEN, params.get("ffn_dim_multiplier", 1), params["multiple_of"])
    state = whole(case, intermediate)
    all_distinct(state)
    folder = fresh(out, case.name)
    (folder / "source" / "params.json").write_text(json.dumps(params))
    for rank in range(case.ranks):
        torch.save(shard(case, state, rank), folder / "source" / f"consolidated.{rank:02d}.pth")
    with tempfile.TemporaryDirectory() as scratch:
        # the script reads every .pth of the folder with torch.load, so nothing else may lie there
        write_model(
            model_path=scratch,
            input_base_path=str(folder / "source"),
            llama_version=case.generation,
            vocab_size=VOCAB,
            num_shards=case.ranks,
        )
        (folder / "truth" / "model.safetensors").write_bytes((pathlib.Path(scratch) / "model.safetensors").read_bytes())
        config = json.loads((pathlib.Path(scratch) / "config.json").read_text())
    write_config(folder / "truth", config)
    keep_only(folder / "truth", "model.safetensors", "config.json")
    truth = load_file(folder / "truth" / "model.safetensors")
    all_distinct(truth)
    if len(truth) != 9 * LAYERS + 3:
        raise SystemExit(f"{case.name}: {len(truth)} tensors")
    write_case(
        folder,
        tool="transformers convert_llama_weights_to_hf.py",
        made_with=versions("transformers", "safetensors"),
        function="transformers.models.llama.convert_llama_weights_to_hf.write_model",
        entry="",
        forward=True,
        backward=False,
        checks={},
        sizes={
            "generation": case.generation, "tensor_parallel": case.ranks, "heads": case.heads,
            "kv_heads": case.kv_heads or case.heads, "head_dim": HIDDEN // case.heads, "hidden": HIDDEN,
            "intermediate": intermediate, "layers": LAYERS, "vocab": VOCAB, "embedding_split_dim": case.embedding_dim,
        },  # fmt: skip
        notes=[
            "random bf16 weights in Meta's names, cut by the rules of Meta's fairscale layers",
            "rope.freqs is in every file and has no place in the truth",
            *(["all tensors of a file are views into one storage"] if case.one_storage else []),
            *(["params.json has vocab_size -1, as Llama 2's"] if case.generation == "2" else []),
            *(["params.json has no n_kv_heads"] if case.kv_heads is None else []),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            make(case, arguments.out)


if __name__ == "__main__":
    main()
