#!/usr/bin/env bash
# Start vLLM servers for rollout=vllm_server and print the plain command, so that it can be run anywhere else.
#
#   bash scripts/serve_rollouts.sh [--model M] [--lora RANK] [--servers N] [--gpus G,H] [--host H] [--port P]
#                                  [--dtype D] [--max-model-len L] [--print] [-- more vLLM arguments]
#
# --model M          as model.path of the training run (default: bundled:smollm2-135m-instruct)
# --lora RANK        for training an adapter of at most this rank; without it all weights are expected from the trainer
# --servers N        that many servers on ports P, P+1, ... (default: 1)
# --gpus G,H         the GPU of each server, named as CUDA_VISIBLE_DEVICES does; leave out the trainer's. Must be given for several
#                    servers on GPUs. With -- --tensor-parallel-size 2 a server has two: --gpus 1+2,3+4
# --host H, --port P where they listen (default: 127.0.0.1, 8000)
# --dtype D          float32 or bfloat16 (default: what trainer.precision=auto computes in on this machine)
# --max-model-len L  longest prompt plus completion in tokens (default: 2048)
# --print            only print the commands
#
# GSPO_ROLLOUT_KEY   API key the servers ask for; must be set where H is not a loopback address.
#                    It guards /v1 only: whoever reaches the port can replace the weights. See docs/rollouts.md.
# GSPO_VLLM_VENV     environment with vLLM (default: .venv-vllm in this folder, else GSPO_VENV, else .venv)
#
# Ends when all servers have ended, with the status of one that failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
die() { echo "serve_rollouts: error: $*" >&2; exit 1; }
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }

model=bundled:smollm2-135m-instruct lora="" servers=1 gpus="" host=127.0.0.1 port=8000 dtype="" length=2048 only_print=""
extra=()
while [ $# -gt 0 ]; do
  case "$1" in
    --print) only_print=yes; shift; continue ;;
    -h | --help) usage; exit 0 ;;
    --) shift; extra=("$@"); break ;;
  esac
  [ $# -ge 2 ] || die "$1 needs a value, or is no option; see --help"
  case "$1" in
    --model) model="$2" ;;
    --lora) lora="$2" ;;
    --servers) servers="$2" ;;
    --gpus) gpus="$2" ;;
    --host) host="$2" ;;
    --port) port="$2" ;;
    --dtype) dtype="$2" ;;
    --max-model-len) length="$2" ;;
    *) die "unknown option $1; see --help" ;;
  esac
  shift 2
done
whole() { [[ "$2" =~ ^[1-9][0-9]{0,8}$ ]] || die "$1 $2 is no number $3; give 1 or more"; }
whole --servers "$servers" "of servers"
whole --port "$port" "of a port"
whole --max-model-len "$length" "of tokens"
[ -z "$lora" ] || whole --lora "$lora" "for a rank"
case "$dtype" in
  "" | float32 | bfloat16) ;;
  *) die "--dtype $dtype is neither float32 nor bfloat16" ;;
esac
cards=()
if [ -n "$gpus" ]; then
  [[ "$gpus" =~ ^[A-Za-z0-9/-]+([,+][A-Za-z0-9/-]+)*$ ]] || die "--gpus $gpus is no list of GPUs; write it like 1,2"
  IFS=, read -r -a cards <<<"$gpus"
  [ "${#cards[@]}" -eq "$servers" ] || die "--gpus $gpus is for ${#cards[@]} servers, and --servers is $servers; give one for each"
  [ -z "$(tr ',+' '\n\n' <<<"$gpus" | sort | uniq -d)" ] || die "--gpus $gpus names a GPU twice; give every server its own"
fi
case "$host" in
  127.* | localhost | ::1) ;;
  *) [ -n "${GSPO_ROLLOUT_KEY:-}" ] || die "--host $host is reachable from elsewhere; set GSPO_ROLLOUT_KEY, and a firewall" ;;
esac

venv="$root/.venv-vllm"
[ -x "$venv/bin/python" ] || venv="${GSPO_VENV:-$root/.venv}"
venv="${GSPO_VLLM_VENV:-$venv}"
python="$venv/bin/python"
[ -x "$python" ] || die "there is no environment in $venv; run scripts/setup.sh --vllm-cpu"
has_vllm='import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'
[ -n "$only_print" ] || "$python" -c "$has_vllm" ||
  die "there is no vLLM in $venv; run scripts/setup.sh --vllm-cpu, or set GSPO_VLLM_VENV to an environment that has it"
folder="$("$python" -c 'import sys; from gspo_lightning.policy.bundled import resolve_model; print(resolve_model(sys.argv[1]))' "$model" 2>/dev/null)" ||
  die "--model $model is no model; give a folder, a hub name or bundled:NAME"
if [ -z "$dtype" ]; then
  dtype="$("$python" -c 'from gspo_lightning.config.hardware import choose_precision; print("bfloat16" if "bf16" in choose_precision("auto", "auto") else "float32")' 2>/dev/null)"
fi

# Development endpoints load the weights; eager and a small cache where vLLM runs on a CPU.
settings=(VLLM_SERVER_DEV_MODE=1 "VLLM_API_KEY=\$GSPO_ROLLOUT_KEY")
[ -n "${GSPO_ROLLOUT_KEY:-}" ] || unset 'settings[1]'
arguments=(--model "$folder" --host "$host" --dtype "$dtype" --max-model-len "$length" --block-size 32
  --logprobs-mode processed_logprobs --worker-extension-cls gspo_lightning.rollout.vllm_worker.WeightSync)
if [ -n "$lora" ]; then
  settings+=(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)
  rank=8
  while [ "$rank" -lt "$lora" ]; do rank=$((rank * 2)); done
  arguments+=(--enable-lora --max-loras 1 --max-lora-rank "$rank")
else
  # Random weights until the trainer sends its own: an unsynchronised server cannot pass for a synchronised one.
  arguments+=(--load-format dummy)
fi
# A command that is only printed, with --gpus, is for a machine that has them.
if [ -z "$only_print" ] || [ -z "$gpus" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  [ -z "$gpus" ] || die "--gpus $gpus has no effect: torch sees no GPU here; leave it out"
  settings+=(VLLM_CPU_OMP_THREADS_BIND=nobind)
  # A prompt cut into chunks ends vLLM 0.32 on a CPU: it turns back the generator of a seeded request, and those cannot.
  batch=$((length > 4096 ? length : 4096))
  arguments+=(--enforce-eager --kv-cache-memory-bytes 1073741824 --max-num-seqs 64
    --no-enable-chunked-prefill --max-num-batched-tokens "$batch")
elif [ "$servers" -gt 1 ] && [ -z "$gpus" ]; then
  die "--servers $servers would all take the first GPU; give each its own, and none the trainer's, such as --gpus 1,2"
fi

children=()
trap 'kill ${children[@]+"${children[@]}"} 2>/dev/null || true' EXIT INT TERM
for ((number = 0; number < servers; number++)); do
  command=("$python" -m vllm.entrypoints.openai.api_server "${arguments[@]}" --port $((port + number)) ${extra[@]+"${extra[@]}"})
  own=("${settings[@]}")
  [ -z "$gpus" ] || own+=("CUDA_VISIBLE_DEVICES=${cards[number]//+/,}")
  echo "${own[*]} ${command[*]}"
  [ -z "$only_print" ] || continue
  env "${own[@]/\$GSPO_ROLLOUT_KEY/${GSPO_ROLLOUT_KEY:-}}" "${command[@]}" &
  children+=($!)
done
status=0
for child in ${children[@]+"${children[@]}"}; do
  wait "$child" || status=$?
done
exit "$status"
