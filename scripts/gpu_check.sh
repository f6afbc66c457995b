#!/usr/bin/env bash
# Everything that needs a GPU, without a network and with weights made at random: the tests marked gpu, then the
# throughput table, beside TRL if scripts/setup.sh --peers has been run. Meant to end within nine minutes.
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
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

"$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu_check: error: no CUDA device is visible to torch")'

# Side by side: most of their time is spent compiling kernels, on the CPU.
logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
status=0
declare -A running
for file in tests/gpu/test_*.py; do
  # Lightning takes the first signal for a wish; the names of the tests say how far it came.
  timeout -k 10 240 "$python" -m pytest -v -m gpu "$file" --durations=3 >"$logs/$(basename "$file").log" 2>&1 &
  running[$file]=$!
done
for file in "${!running[@]}"; do
  wait "${running[$file]}" || status=$?
  echo "== $file"
  cat "$logs/$(basename "$file").log"
done
# Alone: it measures, for as long as the tests have left of nine minutes. The sweeps come last, and what the time does not
# suffice for is left out.
"$python" scripts/gpu_benchmark.py --seconds "$((500 - SECONDS))" --out "$out/gpu.json" || status=$?
exit "$status"
