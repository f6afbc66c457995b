#!/usr/bin/env bash
# Before every commit: ruff, mypy, and the tests that take no model and no process of their own: about half a minute of CPU time.
#
#   bash scripts/check.sh [pytest arguments]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="${GSPO_VENV:-$root/.venv}/bin"
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

"$bin/python" -m ruff check .
"$bin/python" -m ruff format --check .
"$bin/python" -m mypy
exec "$bin/python" -m pytest -q -x tests/objective tests/packing tests/data tests/rewards tests/report tests/migrate tests/docs \
  tests/test_advantages.py tests/test_bad_input.py tests/test_schedule.py "$@"
