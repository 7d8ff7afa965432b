#!/usr/bin/env bash
# Runs on all GPUs of this machine, which share the weights, and exports the model as a folder for vLLM or transformers:
#   launch/gpu_node.sh runs/mine --config=models/llama3.1-8b --data=FILE.jsonl
# GPUS limits their number. EXPORT=adapter writes only the adapters, as needed for --config=…,24gb. If the machine can be
# preempted, use a run directory on storage that persists, and rerun the same command when the machine is back.
set -euo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }
[[ ${1:--} != -* ]] || { grep '^# ' "$0" >&2; exit 2; }
run_dir=$1
shift
[[ ${GPUS:-} ]] || command -v nvidia-smi > /dev/null || { echo "nvidia-smi not found: set GPUS" >&2; exit 2; }
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

run python -m itool_jax.main --stage=iterate --run_dir="$run_dir" --mesh.fsdp="$gpus" "$@"
run python -m itool_jax.main --stage=export --config="$run_dir/config.yaml" --export.kind="${EXPORT:-merged}" --overwrite
