#!/usr/bin/env bash
# A run on several nodes, one process a node; what it takes is passed on:
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config=models/llama3.1-8b --data=FILE.jsonl --run_dir=/shared/runs/mine
# The run directory must be one that all nodes see. Two minutes before the time is over, and where the job is preempted,
# Slurm sends SIGTERM to the processes: they keep what they have and end with code 75. After that, and where one was lost
# (the others end with 69; srun gives the highest code, which is the lost one's signal), the job is queued again and goes
# on where it was; RESTARTS bounds how often after a loss.
#SBATCH --job-name=itool
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -uo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }

run srun --cpu-bind=none --kill-on-bad-exit=0 --wait=120 \
    python -m itool_jax.main --stage=iterate --distributed.auto --mesh.data=0 "$@"
code=$?
lost=$((code == 69 || code > 128))
if ((code == 75 || (lost && ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-20}))); then
    run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
