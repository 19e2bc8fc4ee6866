#!/bin/bash
# A config on a SLURM cluster of GPU machines, one process a machine:
#
#     sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh CONFIG --output_root /shared/runs [--field.path value ...]
#
# Run from the root of a checkout on a file system that all machines see, with .venv made there once:
#
#     python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[cuda]'
#
#SBATCH --job-name=jvlm
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=jvlm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -eu

# JAX finds coordinator, number and rank of the processes from SLURM. Left to itself it gives a SLURM task one GPU, so
# the machine's GPUs are named here. (The same for plain SLURM tasks of one GPU each: leave this line out and set
# --ntasks-per-node to the number of GPUs.)
gpus=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS=$gpus

# SIGTERM comes 120 s before the time limit or a preemption: jvlm saves and ends. --requeue puts a preempted job back
# in the queue, and it goes on from its newest checkpoint; a job that ran out of time is submitted again by hand. --kill-on-bad-exit: one dead process ends the others.
exec srun --kill-on-bad-exit=1 .venv/bin/jvlm train "$@" --distributed true
