#!/usr/bin/env bash
# Everything that needs a GPU, without a network and with weights made at random: the tests marked gpu, then the
# throughput table, beside TRL if scripts/setup.sh --peers has been run. Meant to end within nine minutes.
#
#   bash scripts/gpu_check.sh [folder for gpu.json and gpu_tests/, default benchmarks/]
#
# What the tests print and every measurement is in that folder at once, so that it is there if this is killed.
#
# GSPO_PYTHON   the Python to run with (default: that of GSPO_VENV, or of .venv, or python3)
set -euo pipefail

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
  -*) echo "gpu_check: error: unknown option $1; see --help" >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "gpu_check: error: one folder at most, not $*; see --help" >&2; exit 2; }
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$(mkdir -p "${1:-$root/benchmarks}" && cd "${1:-$root/benchmarks}" && pwd)"
python="${GSPO_PYTHON:-${GSPO_VENV:-$root/.venv}/bin/python}"
[ -x "$python" ] || python="$(command -v "$python" || command -v python3)"
cd "$root"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

"$python" -c '
import importlib.util, sys
needed = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "hydra", "torchmetrics", "pytest")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    fix = "run scripts/setup.sh --test, or name another Python with GSPO_PYTHON"
    sys.exit(f"gpu_check: error: {sys.executable} lacks {chr(44).join(missing)}; {fix}")
import torch
torch.cuda.is_available() or sys.exit("gpu_check: error: no CUDA device is visible to torch")
'

# Side by side: most of their time is spent compiling kernels, on the CPU.
logs="$out/gpu_tests"
mkdir -p "$logs"
status=0
declare -A running
trap 'kill "${running[@]}" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for file in tests/gpu/test_*.py; do
  # Lightning takes the first signal for a wish; the names of the tests say how far it came.
  timeout -k 10 240 "$python" -m pytest -v -m gpu "$file" --durations=3 >"$logs/$(basename "$file").log" 2>&1 &
  running[$file]=$!
done
for file in "${!running[@]}"; do
  wait "${running[$file]}" || status=$?
  unset 'running[$file]'
  echo "== $file"
  cat "$logs/$(basename "$file").log"
done
# Alone: it measures, for as long as the tests have left of nine minutes. The sweeps come last, and what the time does not
# suffice for is left out.
"$python" scripts/gpu_benchmark.py --seconds "$((500 - SECONDS))" --out "$out/gpu.json" || status=$?
exit "$status"
