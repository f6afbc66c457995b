#!/usr/bin/env bash
# Set up with the test extra and run the tests.
#
#   bash scripts/test.sh [--slow] [--gpu] [--vllm] [pytest arguments]
#
# Without an option: the default tier. Each option adds a tier to it.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${GSPO_VENV:-$root/.venv}/bin/python"

tiers=(slow gpu vllm)
arguments=()
for option in "$@"; do
  case "$option" in
    --slow | --gpu | --vllm)
      kept=()
      for tier in ${tiers[@]+"${tiers[@]}"}; do
        [ "--$tier" = "$option" ] || kept+=("$tier")
      done
      tiers=(${kept[@]+"${kept[@]}"})
      ;;
    *) arguments+=("$option") ;;
  esac
done
marks=""
for tier in ${tiers[@]+"${tiers[@]}"}; do
  marks="${marks:+$marks and }not $tier"
done

bash "$root/scripts/setup.sh" --test
cd "$root"
exec "$python" -m pytest -m "$marks" ${arguments[@]+"${arguments[@]}"}
