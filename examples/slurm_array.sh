#!/usr/bin/env bash
# A sweep as an array of Slurm jobs, each with one GPU:
#
#     sbatch examples/slurm_array.sh configs/sweeps/paper_cifar100.py runs/paper
#
# Job I of N trains the runs I, I + N, I + 2 N... and stops a few minutes before its time limit; submit
# the same command again to go on. All jobs must see the same folder, and its file system must support
# flock (on Lustre, the mount option `flock`): jobs that need the same teacher wait for the one that
# trains it. Only the syntax of this script has been checked; it has not run on a cluster yet.
#
#SBATCH --job-name=ipwd_sweep
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --output=slurm_%A_%a.log
set -euo pipefail

sweep=${1:?usage: sbatch examples/slurm_array.sh SWEEP_FILE [FOLDER]}
folder=${2:-runs}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch
# 11 hours and 45 minutes: what is left of the time limit suffices to save the run in progress.
srun python -m ipwd_jax.sweep --config="$sweep" --out="$folder" --minutes=705 \
    --index="$SLURM_ARRAY_TASK_ID" --count="$SLURM_ARRAY_TASK_COUNT"
