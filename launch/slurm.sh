#!/usr/bin/env bash
# A run on several nodes, one process a node; what it takes is passed on:
#   sbatch --nodes=2 launch/slurm.sh --config=models/llama3.1-8b --data=FILE.jsonl --run_dir=/shared/runs/mine
# The run directory must be one that all nodes see. Two minutes before the time is over, and where the job is preempted,
# Slurm sends SIGTERM to the processes: they keep what they have and end with code 75. After that, and where a node was
# lost (69), the job is queued again and goes on where it was.
#SBATCH --job-name=itool
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -uo pipefail

srun --kill-on-bad-exit=0 --wait=120 python -m itool_jax.main --stage=iterate --distributed.auto --mesh.data=0 "$@"
code=$?
if [[ $code == 75 || $code == 69 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
