#!/usr/bin/env bash
# Starts many runs of one process each, every config with every seed: here 2 × 3 runs, in runs/grid/CONFIG/SEED:
#   sbatch --array=0-5 --gpus=1 launch/slurm_array.sh runs/grid 'demo demo,ablations/ipo' '0 1 2' --iterations=2
# Arguments after the seeds are passed on. A run that reaches its time limit, is preempted or is killed is requeued and
# resumes, as with launch/slurm.sh.
#SBATCH --job-name=itool-array
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
#SBATCH --signal=TERM@120
set -uo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }
(($# >= 3)) && [[ ${SLURM_ARRAY_TASK_ID:-} ]] || { grep '^# ' "$0" >&2; exit 2; }
folder=$1
read -ra configs <<< "$2"
read -ra seeds <<< "$3"
shift 3
number=$SLURM_ARRAY_TASK_ID count=$((${#configs[@]} * ${#seeds[@]}))
if ((number >= count)); then
    echo "task $number is out of range: there are $count runs, so use sbatch --array=0-$((count - 1))" >&2
    exit 2
fi
config=${configs[number / ${#seeds[@]}]}
seed=${seeds[number % ${#seeds[@]}]}

run srun --cpu-bind=none \
    python -m itool_jax.main --stage=iterate --config="$config" --seed="$seed" --run_dir="$folder/$config/$seed" "$@"
code=$?
lost=$((code == 69 || code > 128))
if ((code == 75 || (lost && ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-20}))); then
    run scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # for one task, SLURM_JOB_ID is the whole array's id
fi
exit "$code"
