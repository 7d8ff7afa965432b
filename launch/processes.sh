#!/usr/bin/env bash
# Starts several processes on this machine, as if each were a host, to try out multi-host runs:
#   launch/processes.sh 2 --run_dir=runs/two
set -euo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else exec "$@"; fi; }
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { grep '^# ' "$0" >&2; exit 2; }
count=$1
shift
port=${PORT:-$((20000 + RANDOM % 10000))}

pids=()
for ((i = 0; i < count; i++)); do
    run python -m itool_jax.main --stage=iterate --mesh.data=0 --distributed.coordinator_address="localhost:$port" \
        --distributed.num_processes="$count" --distributed.process_id="$i" "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM INT
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || true; done # a signal ends the wait, but not yet the process
    wait "$pid" || code=$?
done
exit "$code"
