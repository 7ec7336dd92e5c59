#!/bin/sh
# Makes every golden checkpoint anew: environments below $1, results below $2.
#     sh make_all.sh ENVIRONMENTS OUT [deepspeed] [deepspeed-old] [xtuner]
set -eu
make=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" "$2"
envs=$(cd "$1" && pwd)
out=$(cd "$2" && pwd)
shift 2
[ $# -gt 0 ] || set -- deepspeed deepspeed-old xtuner
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
        "$envs/new/bin/python" "$make/make_refused.py" --out "$out/refused"
        "$envs/new/bin/python" "$make/make_hf_trainer.py" --out "$out/hf_trainer"
        for version in 0.16.9 0.14.5; do
            beside new $version
            PYTHONPATH="$envs/deepspeed-$version" "$envs/new/bin/python" "$make/make_deepspeed.py" --out "$out/zero"
        done
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
    *)
        echo "unknown: $what" >&2
        exit 2
        ;;
    esac
done
