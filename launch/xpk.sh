#!/usr/bin/env bash
# Starts a run on a TPU slice of a GKE cluster made by xpk, which writes the JobSet. Arguments: the run's name, the cluster,
# the slice's type, an image built from launch/Dockerfile.cpu with --build-arg EXTRA=tpu, and settings:
#   launch/xpk.sh mine CLUSTER v5litepod-16 IMAGE --config=models/llama3.1-8b --data=/runs/FILE.jsonl --run_dir=/runs/mine
# STORAGE names storage that was registered by `xpk storage create` or `attach`; it is mounted on all hosts.
set -euo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }
(($# >= 4)) || { grep '^# ' "$0" >&2; exit 2; }
name=$1 cluster=$2 slice=$3 image=$4
shift 4
printf -v arguments ' %q' "$@"

run xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$slice" --num-slices=1 \
    --docker-image="$image" --storage="${STORAGE:-itool}" \
    --max-restarts=50 --restart-on-exit-codes=75,69 --termination-grace-period-seconds=120 \
    --command="exec python -m itool_jax.main --stage=iterate --distributed.auto --mesh.data=0$arguments"
