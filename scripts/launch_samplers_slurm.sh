#!/usr/bin/env bash
# Samples for a run whose trainer is a job of its own: one sampler a GPU, any number of nodes.
#
#   export ADPO_JAX_RUN_KEY=...       # the same for the trainer
#   sbatch --nodes=4 scripts/launch_samplers_slurm.sh --trainer=node17:8470 --config=configs/gsm8k.py
#
# NOT YET RUN ON HARDWARE: written from the documentation of SLURM and JAX, run with a
# stand-in for SLURM. The trainer is scripts/launch_slurm.sh with --role=trainer --listen=0.0.0.0:8470. Samplers
# may be fewer or more at any time: this job can be cancelled, resized or started again while the
# trainer runs. Give the model's key values of the mesh for one GPU here (mesh.fsdp=1). For many
# samplers let the trainer write its weights to the cluster's file system (--weights=FOLDER there).
#
#SBATCH --job-name=adpo_samplers
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# Each task is a program by itself: --nodistributed keeps SLURM's variables from joining them. One
# that fails does not take the others down; code 0 is the end of the run, 2 a mistake.
srun --kill-on-bad-exit=0 bash -c '
    for attempt in 1 2 3 4 5; do
        code=0
        python -m adpo_jax.main --role=sampler --nodistributed "$@" || code=$?
        case $code in 0 | 2) exit "$code" ;; esac
        sleep 20
    done
    exit "$code"
' sampler "$@"
