#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes and without a network: the tests marked gpu, then the throughput
# table of randomly initialised models, beside TRL if scripts/setup.sh --peers has been run.
#
#   bash scripts/gpu_check.sh [folder for gpu.json, default benchmarks/]
#
# GSPO_PYTHON   the Python to run with (default: that of GSPO_VENV, or of .venv, or python3)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$(mkdir -p "${1:-$root/benchmarks}" && cd "${1:-$root/benchmarks}" && pwd)"
python="${GSPO_PYTHON:-${GSPO_VENV:-$root/.venv}/bin/python}"
[ -x "$python" ] || python="$(command -v "$python" || command -v python3)"
cd "$root"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

"$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu_check: error: no CUDA device is visible to torch")'
status=0
"$python" -m pytest -q -m gpu tests/gpu --durations=8 || status=$?
"$python" scripts/gpu_benchmark.py --out "$out/gpu.json" || status=$?
exit "$status"
