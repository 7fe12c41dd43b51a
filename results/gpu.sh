#!/usr/bin/env bash
# What an NVIDIA GPU says of the Triton kernels, in under 8 minutes: their tests, compute-sanitizer on a few of them
# where it is installed, `fqt bench --device cuda`, and two short trainings. Nothing is installed or downloaded.
#
#     results/gpu.sh [FOLDER]        PYTHON names the interpreter; the folder is $OUT or runs/gpu if it is not given
#
# The folder then holds summary.txt (one line per part), environment.txt, tests.log, sanitizer.log, bench.json,
# bench.log, training.log and training.jsonl. Status: 0 all passed, 1 a part failed, 2 something is missing.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
folder=${1:-${OUT:-runs/gpu}}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

missing() { echo "gpu.sh: $1" | tee "$folder/summary.txt" >&2; exit 2; }

[ "$(uname -s)" = Linux ] || missing "this is $(uname -s); the script is for Linux"
command -v nvidia-smi >/dev/null || missing "no NVIDIA driver: nvidia-smi is not there"
nvidia-smi -L 2>/dev/null | grep -q GPU || missing "the NVIDIA driver lists no GPU (nvidia-smi -L)"
command -v "$PYTHON" >/dev/null || missing "no Python: set PYTHON to one from 3.10 on"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || missing "$("$PYTHON" -V) is older than 3.10"
absent=$("$PYTHON" - <<'END'
from importlib.util import find_spec
needed = "torch triton numpy scipy sklearn PIL matplotlib click rich jinja2 tomli_w".split()
print(*(name for name in needed if find_spec(name) is None))
END
)
[ -z "$absent" ] || missing "Python packages are missing: $absent (pip install -e . brings all but triton, and torch for CUDA brings that)"
"$PYTHON" -c 'import torch; torch.zeros(1, device="cuda")' 2>/dev/null \
    || missing "torch does not reach the GPU: $("$PYTHON" -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda)')"
compiler=${CC:-$(command -v gcc || command -v clang || command -v cc)}
[ -n "$compiler" ] || missing "Triton needs a C compiler at run time: none of gcc, clang and cc is there"

{
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
    "$PYTHON" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA",
        torch.version.cuda, "triton", triton.__version__, "capability", torch.cuda.get_device_capability())'
    for package in torchao transformer_engine; do
        "$PYTHON" -c "from importlib.metadata import version as v; print('$package', v('$package'))" 2>/dev/null \
            || echo "$package not installed: it does not take part"
    done
    git rev-parse HEAD 2>/dev/null
} >"$folder/environment.txt"

: >"$folder/summary.txt"
failed=0
# part NAME SECONDS LOG COMMAND…: runs it for at most so long; Ctrl-C first, so that a record is kept.
part() {
    local name=$1 most=$2 log=$3 start=$SECONDS status
    shift 3
    timeout --signal=INT --kill-after=10 "$most" "$@" >>"$folder/$log" 2>&1
    status=$?
    local said="passed"
    [ $status -eq 0 ] || { said="FAILED (status $status)"; failed=1; }
    [ $status -ne 124 ] && [ $status -ne 130 ] && [ $status -ne 137 ] || said="ran out of its $most s"
    echo "$name: $said, $((SECONDS - start)) s, $log" | tee -a "$folder/summary.txt"
}

if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    # Most of the time goes into compiling kernels, one after another: side by side where pytest-xdist is there.
    many=$("$PYTHON" -c 'from importlib.util import find_spec; print("-n 8" if find_spec("xdist") else "")')
    # shellcheck disable=SC2086
    part "tests" 150 tests.log "$PYTHON" -m pytest -p no:cacheprovider $many tests/triton_kernels \
        --ignore tests/triton_kernels/test_processes.py --ignore tests/triton_kernels/test_compiled_products.py
else
    echo "tests: left out, pytest is not installed" | tee -a "$folder/summary.txt"
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -n "$sanitizer" ]; then
    part "sanitizer" 50 sanitizer.log "$sanitizer" --error-exitcode 9 "$PYTHON" results/gpu_small.py
else
    echo "sanitizer: left out, compute-sanitizer is not installed" | tee -a "$folder/summary.txt"
    part "small products" 30 sanitizer.log "$PYTHON" results/gpu_small.py
fi

part "bench" 190 bench.log "$PYTHON" -m fqt bench --device cuda --recipe psq8d --repeats 10 --out "$folder/bench.json"

: >"$folder/training.jsonl"
train() {
    part "training $1" 30 training.log "$PYTHON" -m fqt train digits --device cuda --seed 0 --out "$scratch/$1" "${@:2}"
    cat "$scratch/$1/metrics.jsonl" >>"$folder/training.jsonl" 2>/dev/null
}
train convnet --recipe psq8d --steps 200
train resnet18 --recipe default --model resnet18-cifar --amp --steps 60

exit $failed
