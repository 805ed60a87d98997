#!/usr/bin/env bash
# Trains on GPU nodes under SLURM: one process a node, all of the node's GPUs in it.
#
#   sbatch --nodes=4 scripts/launch_slurm.sh --config=configs/gsm8k.py --workdir=/shared/runs/gsm8k
#
# NOT YET RUN ON HARDWARE: written from the documentation of SLURM and JAX, run with a
# stand-in for SLURM. The working folder, data and models lie on a file system that all nodes share.
#
# The processes find each other through SLURM's variables. One process a node, not one a GPU, so
# that a copy of the parameters can be split over the node's GPUs while sampling
# (actor_rollout_ref.rollout.tensor_model_parallel_size).
#
#SBATCH --job-name=adpo_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

# JAX gives a SLURM task one GPU unless it is told otherwise.
JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-8} - 1)))"
export JAX_LOCAL_DEVICE_IDS
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A node that fails takes the step down (--kill-on-bad-exit); the job starts it again, and it goes
# on from the last checkpoint. Codes 2, 3 and 4 are mistakes that another attempt would repeat. Code
# 75 is the time limit or a preemption, for which there is no time left here: the job is queued again.
for attempt in 1 2 3 4 5; do
    code=0
    srun --kill-on-bad-exit=1 python -m adpo_jax.main --distributed "$@" || code=$?
    case $code in
        0 | 2 | 3 | 4) exit "$code" ;;
        75) scontrol requeue "$SLURM_JOB_ID"; exit ;;
    esac
    echo "attempt $attempt ended with code $code"
    sleep 20
done
exit "$code"
