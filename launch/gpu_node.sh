#!/usr/bin/env bash
# A run on all GPUs of this machine, which share the weights, and its model as a folder for vLLM or transformers:
#   launch/gpu_node.sh runs/mine --config=models/llama3.1-8b --data=FILE.jsonl
# GPUS takes fewer of them; EXPORT=adapter writes the adapters alone, as a run with --config=…,24gb wants it. Where the
# machine can be taken away, give it a run directory that stays, and the same command when it is back.
set -euo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }
[[ ${1:--} != -* ]] || { grep '^# ' "$0" >&2; exit 2; }
run_dir=$1
shift
[[ ${GPUS:-} ]] || command -v nvidia-smi > /dev/null || { echo "there is no nvidia-smi here: set GPUS" >&2; exit 2; }
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

run python -m itool_jax.main --stage=iterate --run_dir="$run_dir" --mesh.fsdp="$gpus" "$@"
run python -m itool_jax.main --stage=export --config="$run_dir/config.yaml" --export.kind="${EXPORT:-merged}" --overwrite
