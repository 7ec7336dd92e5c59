"""Two examples for the help of every command."""

from __future__ import annotations

import click

EXAMPLES = {
    "run": ("run mapping.yaml --out models/llama", "run plan.json --workers 8 --max-memory 1GiB"),
    "plan": ("plan mapping.yaml --tensors", "plan mapping.yaml --out plan.json"),
    "convert": (
        "convert global_step500/ out/ --dtype bfloat16",
        "convert adapter/ out/ --use peft/merge --base base=models/llama",
    ),
    "finish": ("finish mapping.yaml", "finish plan.json --out models/llama"),
    "clean": ("clean out/", "clean models/llama"),
    "slurm": ("slurm plan.json --nodes 8 > run.sbatch", "slurm plan.json --nodes 4 --sbatch partition=long -- -q"),
    "inspect": (
        "inspect work_dirs/iter_5198.pth",
        "inspect models/Meta-Llama-3-8B 'model.layers.{i}.mlp.{rest...}'",
    ),
    "verify": ("verify out/", "verify out/ --sources mapping.yaml"),
    "diff": ("diff out/model reference/model --rtol 1e-3", "diff out/model mapping.yaml --cast bfloat16 --limit 5"),
    "explain": (
        "explain mapping.yaml --tensor lm_head.weight",
        "explain mapping.yaml --tensor model.norm.weight --json",
    ),
    "init": ("init work_dirs/iter_5198.pth --out mapping.yaml", "init merge.yml --out mapping.yaml"),
    "invert": ("invert mapping.yaml --out back.yaml", "invert mapping.yaml --source trained"),
    "schema": ("schema > mapping.schema.json", "schema --preset > preset.schema.json"),
    "presets list": ("presets list", "presets list --json"),
    "presets show": ("presets show peft/merge", "presets show xtuner/llava-to-hf > mine.yaml"),
    "report": ("report out/", "report out/ --out report.html"),
    "attest": ("attest out/model", "attest out/model --mapping mapping.yaml --out model.intoto.json"),
    "bench": ("bench --size 1GiB", "bench --scratch /data --rounds 5"),
    "errors": ("errors missing-rank", "errors --json"),
    "completion": (
        'completion bash  # then: eval "$(shardmerge completion bash)"',
        "completion zsh > ~/.zfunc/_shardmerge",
    ),
}


def add_examples(group: click.Group, above: str = "") -> None:
    """Puts the examples at the end of the help of every command below a group."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            add_examples(command, f"{name} ")
        elif f"{above}{name}" in EXAMPLES:
            lines = (f"  shardmerge {line}" for line in EXAMPLES[f"{above}{name}"])
            command.epilog = "\n".join(("\b", "Examples:", *lines))
