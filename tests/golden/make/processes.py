"""Runs a script as W ranks on one machine, and makes DeepSpeed run there without an accelerator."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import socket
import subprocess
import sys
import types
from collections.abc import Sequence
from typing import Any


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


def installed_version() -> tuple[int, ...]:
    return version_tuple(importlib.metadata.version("deepspeed"))


def prepare_deepspeed() -> str:
    """Import DeepSpeed for CPU and gloo; its version. Call it before anything else imports it."""
    old = installed_version() < (0, 13)
    if old:
        _before_old()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    try:
        # a compiled shared-memory collective; gloo alone is enough here
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        if hasattr(backend, "build_shm_op"):
            backend.build_shm_op = lambda: None
    except ImportError:
        pass
    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    if old:
        _after_old(accelerator)
    return str(deepspeed.__version__)


def _before_old() -> None:
    """DeepSpeed 0.9 to 0.12 know the CPU only beside Intel's extension, and a name of older torch."""
    import torch.distributed.elastic.agent.server.api as api

    for name in ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch"):
        if importlib.util.find_spec(name) is None:
            stub: Any = types.ModuleType(name)
            stub.__version__ = "2.0.0"
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stub
    for missing in ("log", "_get_socket_with_port"):
        if not hasattr(api, missing):
            setattr(api, missing, logging.getLogger("elastic"))


def _after_old(accelerator: Any) -> None:
    import torch

    def by_dtype(tensors: list[Any]) -> list[tuple[str, list[Any]]]:
        kinds: dict[str, list[Any]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.type(), []).append(tensor)
        return list(kinds.items())

    # the original knows only types of the form torch.cpu.HalfTensor
    engine: Any = importlib.import_module("deepspeed.runtime.engine")
    engine.split_half_float_double_sparse = by_dtype
    if installed_version() < (0, 10):

        class Nothing:
            """A stream or event of an accelerator that has none."""

            def __init__(self, *args: Any, **more: Any) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *args: object) -> None:
                pass

            def __getattr__(self, name: str) -> Any:
                return lambda *args, **more: True

        accelerator.Stream = accelerator.Event = property(lambda self: Nothing)
        accelerator.stream = lambda self, stream: Nothing()
        accelerator.current_stream = accelerator.default_stream = lambda self, *args: Nothing()
        torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]
    accelerator.communication_backend_name = lambda self: "gloo"
    for name in ("deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.bf16_optimizer"):
        for value in list(vars(importlib.import_module(name)).values()):
            if isinstance(value, type) and value.__module__ == name and "step" in vars(value):
                # they write to the leaf tensors of the optimizer outside no_grad
                setattr(value, "step", torch.no_grad()(vars(value)["step"]))
