#!/usr/bin/env bash
# Starts a run on all hosts of a Cloud TPU slice, from your own machine; the package must be installed on the hosts:
#   launch/tpu_pod.sh NAME ZONE --config=models/llama3.1-8b --data=/shared/FILE.jsonl --run_dir=/shared/runs/mine
# All hosts must see the data and the run directory (Filestore, or a bucket mounted with gcsfuse). Before maintenance the
# hosts get SIGTERM: the run saves its state and exits with code 75, and this script restarts it when the slice is back.
# It also restarts after a lost host (69) or a broken connection (255), at most RESTARTS times.
# PYTHON is the hosts' Python with the package, 3.11 or newer, such as PYTHON=venv/bin/python.
set -uo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }
(($# >= 2)) || { grep '^# ' "$0" >&2; exit 2; }
name=$1 zone=$2
shift 2
printf -v arguments ' %q' "$@"
lost=0

while true; do
    run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
        --command="${PYTHON:-python3} -m itool_jax.main --stage=iterate --distributed.auto --mesh.data=0$arguments"
    code=$?
    [[ $code == 75 || $code == 69 || $code == 255 ]] || exit "$code"
    [[ $code == 75 ]] || ((++lost <= ${RESTARTS:-20})) || exit "$code"
    state=
    while [[ $state != READY ]]; do
        sleep 30
        state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)') || exit "$code"
        [[ $state != PREEMPTED ]] || exit "$code" # a preempted slice does not come back
    done
done
