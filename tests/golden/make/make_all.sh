#!/bin/sh
# Makes every golden checkpoint anew: environments below $1, results below $2.
#     sh make_all.sh ENVIRONMENTS OUT [deepspeed] [deepspeed-old] [xtuner] [layouts] [dcp] [distributed] [ranks]
set -eu
make=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" "$2"
envs=$(cd "$1" && pwd)
out=$(cd "$2" && pwd)
shift 2
[ $# -gt 0 ] || set -- deepspeed deepspeed-old xtuner layouts dcp distributed ranks
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu

environment() { # NAME REQUIREMENTS
    [ -d "$envs/$1" ] && return
    python3.11 -m venv "$envs/$1"
    "$envs/$1/bin/pip" install -c "$make/constraints.txt" -r "$make/$2"
}

beside() { # NAME VERSION: an older DeepSpeed in a folder of its own
    [ -d "$envs/deepspeed-$2" ] || "$envs/$1/bin/pip" install --no-deps --no-build-isolation \
        --target "$envs/deepspeed-$2" "deepspeed==$2"
}

for what in "$@"; do
    case $what in
    deepspeed)
        environment new requirements-deepspeed.txt
        "$envs/new/bin/pip" install --no-deps --no-build-isolation deepspeed==0.19.8
        "$envs/new/bin/python" "$make/make_deepspeed.py" --out "$out/zero"
        "$envs/new/bin/python" "$make/make_universal.py" --out "$out/universal"
        "$envs/new/bin/python" "$make/make_pipeline.py" --out "$out/pipeline"
        "$envs/new/bin/python" "$make/make_deepspeed_parallel.py" --out "$out/parallel"
        "$envs/new/bin/python" "$make/make_hf_trainer.py" --out "$out/hf_trainer"
        for version in 0.16.9 0.14.5; do
            beside new $version
            PYTHONPATH="$envs/deepspeed-$version" "$envs/new/bin/python" "$make/make_deepspeed.py" --out "$out/zero"
        done
        PYTHONPATH="$envs/deepspeed-0.16.9" "$envs/new/bin/python" "$make/make_pipeline.py" --out "$out/pipeline"
        PYTHONPATH="$envs/deepspeed-0.16.9" "$envs/new/bin/python" "$make/make_deepspeed_parallel.py" \
            --out "$out/parallel"
        ;;
    deepspeed-old)
        environment old requirements-old.txt
        # they build for a CPU only beside Intel's extension; empty stand-ins are enough
        mkdir -p "$envs/stubs/intel_extension_for_pytorch" "$envs/stubs/oneccl_bindings_for_pytorch"
        echo '__version__ = "2.0.0"' > "$envs/stubs/intel_extension_for_pytorch/__init__.py"
        : > "$envs/stubs/oneccl_bindings_for_pytorch/__init__.py"
        for version in 0.10.3 0.9.5; do
            PYTHONPATH="$envs/stubs" beside old $version
            PYTHONPATH="$envs/deepspeed-$version" "$envs/old/bin/python" "$make/make_deepspeed.py" --out "$out/zero"
        done
        ;;
    xtuner)
        environment xtuner requirements-xtuner.txt
        "$envs/xtuner/bin/pip" install --no-deps --no-build-isolation deepspeed==0.16.9
        "$envs/xtuner/bin/pip" install --no-deps xtuner==0.2.0
        "$envs/xtuner/bin/python" "$make/make_xtuner.py" --out "$out/xtuner"
        ;;
    layouts)
        to="$out/layouts"
        mkdir -p "$to"
        environment layouts-hf requirements-layouts-hf.txt
        "$envs/layouts-hf/bin/pip" install --no-deps open_clip_torch==3.3.0 llava-torch==1.2.2.post1
        "$envs/layouts-hf/bin/pip" download --no-deps --dest "$envs" xtuner==0.2.0
        script=xtuner/configs/llava/phi3_mini_4k_instruct_clip_vit_large_p14_336/convert_phi_to_llama.py
        unzip -qoj "$envs"/xtuner-0.2.0-*.whl $script -d "$envs"
        "$envs/layouts-hf/bin/python" "$make/make_layouts_meta.py" --out "$to"
        "$envs/layouts-hf/bin/python" "$make/make_layouts_clip.py" --out "$to"
        "$envs/layouts-hf/bin/python" "$make/make_layouts_llava.py" --out "$to"
        "$envs/layouts-hf/bin/python" "$make/make_layouts_phi3.py" --out "$to" --script "$envs/convert_phi_to_llama.py"
        for version in 4.51.3 4.57.1 5.23.0; do
            environment transformers-$version requirements-layouts-names.txt
            "$envs/transformers-$version/bin/pip" install transformers==$version
            "$envs/transformers-$version/bin/python" "$make/make_layouts_llava_names.py" --out "$to"
        done
        "$envs/transformers-4.57.1/bin/python" "$make/make_layouts_internvl.py" --out "$to"
        environment layouts-torchtune requirements-layouts-torchtune.txt
        "$envs/layouts-torchtune/bin/pip" install --no-deps torchtune==0.6.1 torchao==0.9.0 torchdata==0.11.0 kagglehub
        "$envs/layouts-torchtune/bin/python" "$make/make_layouts_torchtune.py" --out "$to" # after _meta: it checks it
        environment layouts-litgpt requirements-layouts-litgpt.txt
        "$envs/layouts-litgpt/bin/pip" install --no-deps litgpt==0.5.13 lightning==2.6.1 lightning-utilities \
            torchmetrics pytorch-lightning
        "$envs/layouts-litgpt/bin/python" "$make/make_layouts_litgpt.py" --out "$to"
        "$envs/layouts-litgpt/bin/pip" install --no-deps --target "$envs/litgpt-0.4.13" litgpt==0.4.13
        PYTHONPATH="$envs/litgpt-0.4.13" "$envs/layouts-litgpt/bin/python" "$make/make_layouts_litgpt.py" --out "$to"
        environment layouts-megatron requirements-layouts-megatron.txt
        "$envs/layouts-megatron/bin/pip" install --no-deps megatron-core==0.16.1
        "$envs/layouts-megatron/bin/python" "$make/make_layouts_megatron.py" --out "$to"
        "$envs/layouts-megatron/bin/python" "$make/make_layouts_torch_dist.py" --out "$to"
        ;;
    dcp)
        environment distributed requirements-distributed.txt
        "$envs/distributed/bin/python" "$make/make_dcp.py" --out "$out/dcp"
        ;;
    distributed)
        environment distributed requirements-distributed.txt
        "$envs/distributed/bin/python" "$make/make_distributed_safetensors.py" --out "$out/distributed_safetensors"
        ;;
    ranks)
        environment ranks requirements-ranks.txt
        "$envs/ranks/bin/python" "$make/make_ranks.py" --out "$out/ranks"
        ;;
    *)
        echo "unknown: $what" >&2
        exit 2
        ;;
    esac
done
