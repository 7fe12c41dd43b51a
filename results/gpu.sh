#!/usr/bin/env bash
# What an NVIDIA GPU says of the Triton kernels, in under 8 minutes: small calls against the CPU, their tests,
# compute-sanitizer where it is installed, `fqt bench --device cuda`, and two short trainings. Nothing is downloaded.
#
#     results/gpu.sh [FOLDER]              the folder is $OUT or runs/gpu if it is not given
#     results/gpu.sh --rehearse [FOLDER]   the same parts on a machine without a GPU, each with little to do
#
# PYTHON names the interpreter. Packages that it lacks may lie as wheels in .whl/ (a machine without a network):
#
#     pip download --no-deps --dest .whl tomli-w
#
# The folder then holds eight files: summary.txt (one line per part), environment.txt, tests.log, measure.log,
# bench-linear.json, bench-gpt.json, bench-resnet50.json and training.jsonl. A part that fails or runs out of its
# time ends alone; what it wrote stays. Status: 0 all passed, 1 a part failed, 2 something is missing.
set -u
cd "$(dirname "$0")/.." || exit 2
rehearse=
[ "${1:-}" != --rehearse ] || { rehearse=1; shift; }
PYTHON=${PYTHON:-python3}
folder=${1:-${OUT:-runs/gpu}}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
: >"$folder/summary.txt"

say() { echo "$1" | tee -a "$folder/summary.txt"; }
missing() { say "gpu.sh: $1"; exit 2; }

[ "$(uname -s)" = Linux ] || missing "this is $(uname -s); the script is for Linux"
command -v "$PYTHON" >/dev/null || missing "no Python: set PYTHON to one from 3.10 on"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || missing "$("$PYTHON" -V) is older than 3.10"

export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLCONFIGDIR="$scratch"
# Kept from one run to the next, where the machine is: most of the time goes into compiling.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/fqt-gpu/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/fqt-gpu/inductor}"
wheels=(.whl/*.whl)
if [ -e "${wheels[0]}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "${wheels[@]}" \
        || missing "the wheels in .whl/ do not install"
    PYTHONPATH="$PYTHONPATH:$scratch/site"
fi
absent=$("$PYTHON" - <<'END'
from importlib.util import find_spec
needed = "torch triton numpy scipy sklearn PIL matplotlib click rich jinja2 tomli_w".split()
print(*(name for name in needed if find_spec(name) is None))
END
)
[ -z "$absent" ] || missing "Python packages are missing: $absent (pip install -e . brings all but triton, which torch for CUDA brings; or as wheels in .whl/)"
if [ -n "$rehearse" ]; then
    device=cpu
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
else
    device=cuda
    command -v nvidia-smi >/dev/null || missing "no NVIDIA driver: nvidia-smi is not there"
    nvidia-smi -L 2>/dev/null | grep -q GPU || missing "the NVIDIA driver lists no GPU (nvidia-smi -L)"
    "$PYTHON" -c 'import torch; torch.zeros(1, device="cuda")' 2>/dev/null \
        || missing "torch does not reach the GPU: $("$PYTHON" -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda)')"
    compiler=${CC:-$(command -v gcc || command -v clang || command -v cc)}
    [ -n "$compiler" ] || missing "Triton needs a C compiler at run time: none of gcc, clang and cc is there"
fi

{
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
    "$PYTHON" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA",
        torch.version.cuda, "triton", triton.__version__)
if torch.cuda.is_available(): print("capability", torch.cuda.get_device_capability())'
    "$PYTHON" -c 'from fqt import kernels; print("CPU kernels:", kernels.status())'
    for package in torchao transformer_engine; do
        "$PYTHON" -c "from importlib.metadata import version as v; print('$package', v('$package'))" 2>/dev/null \
            || echo "$package not installed: it does not take part"
    done
    git rev-parse HEAD 2>/dev/null
} >"$folder/environment.txt" 2>&1

failed=0
# Where this script was started with Ctrl-C ignored (in the background), Python would not hear of it either.
hearing=$(env --default-signal=INT true 2>/dev/null && echo "env --default-signal=INT")
# part NAME SECONDS LOG COMMAND…: runs it for at most so long; Ctrl-C first, so that a record is kept.
part() {
    local name=$1 most=$2 log=$3 start=$SECONDS status
    shift 3
    echo "== $name" >>"$folder/$log"
    $hearing timeout --signal=INT --kill-after=10 "$most" "$@" >>"$folder/$log" 2>&1
    status=$?
    local said="passed"
    [ $status -eq 0 ] || { said="FAILED (status $status)"; failed=1; }
    [ $status -ne 124 ] && [ $status -ne 130 ] && [ $status -ne 137 ] || said="ran out of its $most s"
    say "$name: $said, $((SECONDS - start)) s, $log"
}

part "small calls" 60 tests.log "$PYTHON" results/gpu_small.py $device

if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    # Kernels are compiled one after another: side by side where pytest-xdist is there. No other plugin is needed, and
    # one that warns would be an error.
    many=$("$PYTHON" -c 'from importlib.util import find_spec; print("-p xdist -n 8" if find_spec("xdist") else "")')
    files=(tests/triton_kernels)
    [ -z "$rehearse" ] || { many=; files=(tests/triton_kernels/test_noise.py); }
    # shellcheck disable=SC2086
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=2 part "tests" 130 tests.log "$PYTHON" -m pytest \
        -p no:cacheprovider $many --maxfail 30 -W default "${files[@]}" \
        --ignore tests/triton_kernels/test_processes.py --ignore tests/triton_kernels/test_compiled_products.py
else
    say "tests: left out, pytest is not installed"
fi

bench() {
    part "bench $1" "$2" measure.log "$PYTHON" -m fqt bench --device $device --out "$folder/bench-$1.json" "${@:3}"
}
: >"$folder/training.jsonl"
train() {
    part "training $1" 45 measure.log "$PYTHON" -m fqt train digits --device $device --seed 0 --out "$scratch/$1" "${@:2}"
    cat "$scratch/$1/metrics.jsonl" >>"$folder/training.jsonl" 2>/dev/null
}
if [ -n "$rehearse" ]; then
    bench linear 120 linear-1024 --recipe psq8d --quick --repeats 1
    train convnet --recipe psq8d --steps 4
    exit $failed
fi

bench linear 90 linear-4096 --recipe psq8d --repeats 10
train convnet --recipe psq8d --steps 200
train resnet18 --recipe default --model resnet18-cifar --amp --steps 60
bench gpt 80 gpt-2048 --recipe psq8d --repeats 10
bench resnet50 40 resnet50 --recipe psq8d --quick

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -n "$sanitizer" ]; then
    part "sanitizer" 30 tests.log "$sanitizer" --error-exitcode 9 "$PYTHON" results/gpu_small.py
else
    say "sanitizer: left out, compute-sanitizer is not installed"
fi

exit $failed
