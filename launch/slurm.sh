#!/usr/bin/env bash
# Starts a run on several nodes, one process per node; passes settings on:
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config=models/llama3.1-8b --data=FILE.jsonl --run_dir=/shared/runs/mine
# All nodes must see the run directory. Two minutes before the time limit, and when the job is preempted, Slurm sends
# SIGTERM to the processes: they save their state and exit with code 75. Then the job is requeued and resumes. It is also
# requeued if a process is lost, at most RESTARTS times. The others then exit with 69; srun returns the highest code,
# which is the lost process's signal.
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
