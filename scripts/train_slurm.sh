#!/usr/bin/env bash
# Train on several machines under Slurm:
#
#   sbatch scripts/train_slurm.sh --preset 8xh100 --data data/edu --out runs/edu
#
# Two minutes before its time is over the job gets SIGTERM, saves, and is
# queued again; --resume then goes on. Both folders must be on a disk that all
# machines see.
#SBATCH --job-name=llama_tut
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT NNODES=$SLURM_NNODES

# One task a machine; torchrun starts its ranks. srun passes SIGTERM on.
srun bash -c 'NODE_RANK=$SLURM_NODEID exec scripts/train_ddp.sh "$@"' \
  train_ddp --resume "$@"

# An unfinished run has no model yet: queue the job again.
for ((i = 1; i <= $#; i++)); do
  if [ "${!i}" = --out ]; then j=$((i + 1)); out=${!j}; fi
done
if [ ! -d "${out:?--out is missing}/model" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
