#!/usr/bin/env bash
# One run on the GPUs of several nodes, with a process for each GPU:
#
#     sbatch examples/slurm_nodes.sh --config=configs/cifar_ipwd.py --workdir=/shared/runs/ipwd
#
# All arguments go to `python -m ipwd_jax.main`. The folder of the run and the data must be on a file
# system that all nodes share. Five minutes before the time limit, the run saves and stops; submit the
# same command again to go on. docs/distributed.md explains the rest. This script has been run with two
# processes on one machine in place of srun, but not on a cluster yet.
#
#SBATCH --job-name=ipwd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=slurm_%j.log
set -euo pipefail

: "${1:?usage: sbatch examples/slurm_nodes.sh --config=FILE [--workdir=DIR] [--config.NAME=VALUE...]}"
# Each process must see all GPUs of its node, of which JAX gives it one; so no --gpus-per-task here.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch
srun --kill-on-bad-exit=1 python -m ipwd_jax.main --distributed "$@"
