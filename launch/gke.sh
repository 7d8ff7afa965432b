#!/usr/bin/env bash
# A run on GPU nodes of a Kubernetes cluster: its name (a-z, 0-9, -), how many nodes, and an image made with launch/Dockerfile.cuda:
#   launch/gke.sh mine 2 IMAGE --config=models/llama3.1-8b --data=/runs/FILE.jsonl --run_dir=/runs/mine
# ACCELERATOR and GPUS say what a node has. The cluster needs JobSet and the storage of launch/gke_storage.yaml. What is
# applied is kept in NAME.yaml: `kubectl delete -f mine.yaml` ends the run, and the same command goes on with it.
set -euo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }
[[ ${1:-} =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${2:-} =~ ^[1-9][0-9]*$ && ${3:-} ]] || { grep '^# ' "$0" >&2; exit 2; }
name=$1 nodes=$2 image=$3
shift 3
quote="'" setting="                    - "

manifest=$(< "${BASH_SOURCE[0]%/*}/gke.yaml")
manifest=${manifest//NAME/"$name"}
manifest=${manifest//NODES/"$nodes"}
manifest=${manifest//GPUS/"${GPUS:-8}"}
manifest=${manifest//ACCELERATOR/"${ACCELERATOR:-nvidia-h100-80gb}"}
manifest=${manifest//IMAGE/"$image"}
settings=
(($# == 0)) || printf -v settings "$setting'%s'\n" "${@//$quote/$quote$quote}"
printf '%s\n' "${manifest/"$setting"SETTINGS$'\n'/"$settings"}" > "$name.yaml"
run kubectl apply -f "$name.yaml"
