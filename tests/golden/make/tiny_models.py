"""The tiny models that the golden checkpoints are trained from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BATCH, LENGTH, VOCAB = 2, 6, 33


def llama(tied: bool = False, layers: int = 2) -> nn.Module:
    """A Llama of Hugging Face transformers: hidden 8, two heads, one key-value head, odd vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def lora() -> nn.Module:
    """The same Llama with a PEFT LoRA on two projections; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(llama(), config)


class Piece(nn.Module):
    """One parameter of any shape; its forward gives a scalar that depends on every element."""

    def __init__(self, *shape: int, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape), requires_grad=not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(-1)
        ramp = torch.linspace(0.5, 1.5, flat.numel(), device=flat.device).to(flat.dtype)
        return ((flat * ramp - x.mean()) ** 2).mean()


class Buffers(nn.Module):
    """Persistent buffers of several dtypes and shapes, and one that is not saved."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.25))
        self.register_buffer("running_mean", torch.randn(3, 5))
        self.register_buffer("steps", torch.tensor(1234567890123, dtype=torch.int64))
        self.register_buffer("position_ids", torch.arange(7).reshape(1, 7))
        self.register_buffer("mask", torch.tensor([[True, False, True], [False, False, True]]))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.to(x.dtype)


class Bag(nn.Module):
    """A bag of odd shapes: odd element counts, a one-element parameter, frozen ones, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Piece(3, 5, 7)
        self.one = Piece(1)
        self.matrix = Piece(11, 13)
        self.long = Piece(31)
        self.frozen = nn.ModuleList([Piece(7, 3, frozen=True), Piece(5, frozen=True)])
        self.blocks = nn.ModuleList([Piece(3, 3), Piece(2, 9), Piece(1, 1)])
        self.deep = Piece(2, 3, 1, 5)
        self.buffers_ = Buffers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.buffers_(x)
        total = self.wide(x) + self.one(x) + self.matrix(x) + self.long(x) + self.deep(x)
        for piece in [*self.blocks, *self.frozen]:
            total = total + piece(x)
        return total


class Specks(nn.Module):
    """Parameters of 1, 2, 3 and 5 elements: with four ranks most of them hold only padding."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Piece(1)
        self.two = Piece(2)
        self.three = Piece(3, 1)
        self.five = Piece(5)
        self.frozen_one = Piece(1, frozen=True)
        self.frozen_six = Piece(2, 3, frozen=True)
        self.plain = Piece(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = [self.one, self.two, self.three, self.five, self.frozen_one, self.frozen_six, self.plain]
        return sum((piece(x) for piece in pieces), torch.zeros((), dtype=x.dtype))


def build(kind: str) -> nn.Module:
    makers: dict[str, Any] = {
        "llama": llama,
        "tied": lambda: llama(tied=True),
        "tied_small": lambda: llama(tied=True, layers=1),
        "lora": lora,
        "bag": Bag,
        "specks": Specks,
    }
    return makers[kind]()


def groups_of(model: nn.Module, kind: str, count: int, with_frozen: bool = False) -> list[dict[str, Any]]:
    """The optimizer's param groups.

    Two groups: by number of axes (weight decay or not). Three groups: the one-element parameters
    stand alone, so that their flat group is shorter than one rank's part of it.
    """
    named = [(n, p) for n, p in model.named_parameters() if with_frozen or p.requires_grad]
    if count == 1:
        return [{"params": [p for _, p in named]}]
    small = [p for _, p in named if p.numel() == 1] if count == 3 else []
    rest = [p for _, p in named if count < 3 or p.numel() > 1]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if small:
        groups.insert(1, {"params": small, "weight_decay": 0.0, "lr": 3e-2})
    return groups


def loss_of(engine: nn.Module, kind: str, step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """The loss of one synthetic batch, different on every rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    if kind in ("bag", "specks"):
        return engine(torch.randn(BATCH, 4, generator=generator).to(dtype))
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    return engine(input_ids=ids, labels=ids).loss
