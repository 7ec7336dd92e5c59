"""Runs a script as W ranks on one machine, and makes DeepSpeed run there without an accelerator."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def spawn(script: str, arguments: Sequence[str], world: int) -> int:
    """Start `script arguments` once per rank; the first non-zero exit status, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(world):
        env = dict(os.environ)
        env.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            LOCAL_SIZE=str(world),  # else DeepSpeed asks numactl
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            GLOO_SOCKET_IFNAME="lo",
            OMP_NUM_THREADS="1",
            DS_ACCELERATOR="cpu",
            TOKENIZERS_PARALLELISM="false",
            TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1",  # DeepSpeed before 0.15 knew no other loading
        )
        ranks.append(subprocess.Popen([sys.executable, script, *arguments], env=env))
    status = 0
    for rank in ranks:
        status = rank.wait() or status
        if status:
            for other in ranks:
                other.terminate()
    return status


def version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3])


def prepare_deepspeed() -> str:
    """Import DeepSpeed for CPU and gloo; its version. Call it before anything else imports it."""
    import torch

    import deepspeed

    try:
        # a compiled shared-memory collective; gloo alone is enough here
        backend = importlib.import_module("deepspeed.comm.torch")
        if hasattr(backend, "build_shm_op"):
            backend.build_shm_op = lambda: None
    except ImportError:
        pass
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    type(accelerator).is_fp16_supported = lambda self: True
    if version_tuple(deepspeed.__version__) < (0, 13):
        _prepare_old(torch, deepspeed, type(accelerator))
    return str(deepspeed.__version__)


def _prepare_old(torch, deepspeed, accelerator_class) -> None:  # type: ignore[no-untyped-def]
    """What DeepSpeed 0.9 to 0.12 needs beside: they knew CPU only with Intel's extension."""
    accelerator_class._communication_backend_name = "gloo"
    accelerator_class.communication_backend_name = lambda self: "gloo"
    # step() of these versions writes to leaf tensors outside no_grad for some optimizers
    for name in ("deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3"):
        module = importlib.import_module(name)
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == name and "step" in vars(value):
                value.step = torch.no_grad()(vars(value)["step"])
