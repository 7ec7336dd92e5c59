"""What a file of a checkpoint directory is, told by its name: weights, state of a training run, or part of the model.

Names of state are those that the frameworks write: transformers ``trainer.py`` (``optimizer.pt``, ``scheduler.pt``,
``scaler.pt``, ``rng_state_N.pth``, ``training_args.bin``, ``trainer_state.json``), accelerate ``utils/constants.py``
(``optimizer.bin``, ``sampler.bin``, ``random_states_N.pkl``, ``custom_checkpoint_N.pkl``), verl
(``optim_world_size_4_rank_0.pt``, ``extra_state_world_size_...``), torchtune (``recipe_state.pt``), Megatron
(``distrib_optim.pt``), LLaMA-Factory (``trainer_log.jsonl``), ms-swift (``args.json``, ``logging.jsonl``).
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

# The file that shardmerge writes beside its results.
RECEIPT = "shardmerge.json"
# What a model of transformers says of itself, and what an adapter of peft does.
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
# Where diffusers keeps the same: in the header of a safetensors file, as JSON (0.34, `loaders/lora_base.py`).
ADAPTER_METADATA = "lora_adapter_metadata"
# What verl writes beside the ranks of a LoRA run: r, lora_alpha and task_type.
LORA_META = "lora_train_meta.json"

# Kinds of weights that are read, and those that are known and not read. A small file of these is weights, too.
READ_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
FOREIGN_WEIGHTS = {
    ".gguf": "GGUF (llama.cpp)",
    ".ggml": "GGML (llama.cpp)",
    ".msgpack": "Flax",
    ".h5": "TensorFlow",
    ".onnx": "ONNX",
    ".onnx_data": "ONNX",
    ".ckpt": "Lightning or TensorFlow",
    ".distcp": "torch's distributed checkpoint",
    ".nemo": "NeMo",
    ".tar": "tar archive",
    ".ot": "rust-bert",
    ".pdparams": "Paddle",
    ".mlmodel": "Core ML",
}
# The last: ``.metadata`` and ``__0.metadata`` of torch's distributed checkpoints, which say where weights lie.
_OTHER_BINARIES = (".pkl", ".pickle", ".zip", ".gz", ".tgz", ".7z", ".so", ".pyc", ".metadata")

# Downloads and saves that did not end: huggingface_hub, safetensors and rsync, aria2, browsers, wget.
UNFINISHED = (".incomplete", ".tmp", ".partial", ".part", ".aria2", ".crdownload", ".download")

_RANK = r"(?:[_-](?:\d+|rank_?\d+|world_size_\d+_rank_\d+))?\.(?:pt|pth|bin|pkl|safetensors)"
_STATES = (
    ("the state of random generators", r"(?:rng|random)(?:_states?)?" + _RANK),
    ("an optimizer's state", r"(?:\w+_)?optim(?:izer)?s?(?:_states?)?" + _RANK),
    ("a learning rate scheduler's state", r"(?:lr_)?scheduler(?:_states?)?" + _RANK),
    ("a gradient scaler's state", r"(?:grad_|loss_)?scaler(?:_states?)?" + _RANK),
    ("a data loader's state", r"(?:dl_state_dict|(?:dist_)?sampler|dataloader(?:_states?)?)" + _RANK + r"|data\.pt"),
    (
        "state of a training run",
        r"training_args\.bin|custom_checkpoint_\d+\.pkl|recipe_state\.pt|train(?:er|ing)?_state\.(?:pt|pth)"
        r"|extra_state_world_size_\d+_rank_\d+\.pt",
    ),
)
_TRAINING_STATE = tuple((what, re.compile(pattern)) for what, pattern in _STATES)

# Texts of a run, of the hub and of adapters: none of them is read by what loads a model.
_RUN_FILES = {
    "the training run's record": (
        "trainer_state.json", "trainer_log.jsonl", "*_results.json", "training_args.*", "events.out.tfevents.*",
        "*.log", "logging.jsonl", "args.json", "ds_config*.json", "deepspeed_config*.json", "zero_to_fp32.py", "latest",
        "latest_universal", "latest_checkpointed_iteration.txt", "last_checkpoint", "llamaboard_config.yaml",
        "running_log.txt", "nohup.out", "vis_data", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf", "*.mp4",
        "*.sh", "*.csv", "*.ipynb",
    ),
    "an adapter's, which is not part of the model": ("adapter_*",),
    "an index, which is written anew": ("*.index.json", "*.index.*.json"),
    "a receipt of shardmerge": (RECEIPT,),
    "a hidden file": (".*",),
}  # fmt: skip

# What loaders look for beside weights, whatever else lies there.
_KNOWN = (
    "config.json", "generation_config.json", "tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab",
    "merges.txt", "chat_template", "additional_chat_templates/", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "image_processor_config.json", "feature_extractor_config.json", "spiece.model",
    "sentencepiece", "source.spm", "target.spm",
)  # fmt: skip

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.(?:safetensors|bin|pt|pth))")


def shard_place(name: str) -> tuple[str, int, int, str] | None:
    """Returns stem, number, total and suffix of ``model-00002-of-00003.safetensors``; None for any other name."""
    match = _SHARD.fullmatch(name)
    return (match["stem"], int(match["number"]), int(match["total"]), match["suffix"]) if match else None


def training_state(name: str) -> str:
    """Returns what a file of training state is, or ``""`` where the name is not that of one."""
    return next((what for what, pattern in _TRAINING_STATE if pattern.fullmatch(name)), "")


def foreign_weights(name: str) -> str:
    """Returns the kind of weights that a name's ending stands for and that is not read, or ``""``."""
    return next((kind for suffix, kind in FOREIGN_WEIGHTS.items() if name.endswith(suffix)), "")


def is_weights(name: str) -> bool:
    """Tells whether a name is that of weights or of another binary, however small: never copied as a side file."""
    return name.endswith((*READ_SUFFIXES, *FOREIGN_WEIGHTS, *_OTHER_BINARIES, *UNFINISHED))


def left_behind(path: str) -> str:
    """Returns why a side file is no part of the model, or ``""`` where it is part of it.

    Parameters
    ----------
    path
        Inside of the directory, with ``/``: ``additional_chat_templates/rag.jinja``.
    """
    name = path.rsplit("/", 1)[-1]
    if is_weights(name):
        return training_state(name) or "weights, or another binary"
    for reason, patterns in _RUN_FILES.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return reason
    return ""


def comes_along(path: str, *, model_folder: bool) -> bool:
    """Tells whether a side file goes where its model's weights go.

    Parameters
    ----------
    path
        As for ``left_behind``.
    model_folder
        Whether the directory is that of a Hugging Face model, with its config.json: all of it is the model, then. In
        any other one, a directory of work with a .pth in it, only files of known names are.
    """
    return not left_behind(path) and (model_folder or path.startswith(_KNOWN) or path.endswith(".tiktoken"))
