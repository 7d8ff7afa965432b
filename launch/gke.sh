#!/usr/bin/env bash
# Starts a run on GPU nodes of a Kubernetes cluster. Arguments: the run's name (a-z, 0-9, -), the number of nodes, an image
# built from launch/Dockerfile.cuda, and settings:
#   launch/gke.sh mine 2 IMAGE --config=models/llama3.1-8b --data=/runs/FILE.jsonl --run_dir=/runs/mine
# ACCELERATOR and GPUS describe a node. The cluster needs JobSet and the storage of launch/gke_storage.yaml. The applied
# manifest is kept in NAME.yaml: `kubectl delete -f mine.yaml` ends the run, and the same command resumes it.
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
