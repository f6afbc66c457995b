#!/usr/bin/env bash
# From nothing to a trained model: set up, train SmolLM2-135M-Instruct with GSPO, print the result.
#
#   bash scripts/quickstart.sh [Hydra overrides, such as seed=1]
#
# The environment variables of scripts/setup.sh hold here too.
set -euo pipefail

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
die() { echo "quickstart: error: $*" >&2; exit 1; }
case "$(uname -s)" in
  MINGW* | MSYS* | CYGWIN*) die "native Windows is not supported; use WSL2" ;;
esac
for argument in "$@"; do
  case "$argument" in
    '#'*) die "$argument is no override but a comment, which zsh hands on; leave it out" ;;
  esac
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${GSPO_VENV:-$root/.venv}/bin/python"

bash "$root/scripts/setup.sh"
cores="$("$python" -m gspo_lightning.program.threads)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}"
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
[ "$(uname -s)" != Darwin ] || export KMP_BLOCKTIME="${KMP_BLOCKTIME:-0}"
cd "$root"
exec "$python" train.py "$@"
