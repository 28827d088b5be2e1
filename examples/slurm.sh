#!/bin/sh
# One run on several hosts of a SLURM cluster, each with all of its GPUs:
#   sbatch --nodes 2 --gpus-per-node 4 examples/slurm.sh --config run.yaml
# All hosts must see the same files: SMELT_HOME, the config and the run's --out-dir lie on a shared disk.
# The job saves a checkpoint two minutes before its time is up, and goes on when SLURM starts it again: after a host
# has failed by itself (--requeue), after the time limit with `scontrol requeue JOB`.
#SBATCH --job-name smelt
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --time 24:00:00
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --signal TERM@120
set -eu

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ranks_per_host=${SLURM_GPUS_ON_NODE:-1} # on CPUs one
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs may share a host

# $SLURM_NODEID is each task's own, so a shell on each host reads it.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 sh -c '
    first_host=$1 port=$2 ranks_per_host=$3
    shift 3
    exec torchrun \
        --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$ranks_per_host" \
        --master-addr "$first_host" --master-port "$port" \
        -m smelt train --resume-if-begun "$@"
' sh "$first_host" "$port" "$ranks_per_host" "$@"
