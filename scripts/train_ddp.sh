#!/usr/bin/env bash
# Train on all GPUs of this machine, or of several; takes the options of train.py.
#
#   scripts/train_ddp.sh --data data/docs --out runs/first
#   NPROC=4 scripts/train_ddp.sh ...
#   NPROC=4 scripts/train_ddp.sh ... --parallel fsdp --tensor-parallel 2 --recompute
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 scripts/train_ddp.sh ...  (on node0)
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 scripts/train_ddp.sh ...  (on node1)
#
# NPROC        ranks on this machine (all GPUs, else 2)
# NNODES       machines (1); all of them must see --data and --out
# NODE_RANK    which of them this is (0 writes)
# MASTER_ADDR  the address of machine 0; MASTER_PORT a free port there (29500)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python() { # the active environment's, else the project's, else the system's
  if [ -n "${VIRTUAL_ENV:-}" ]; then echo "$VIRTUAL_ENV/bin/python"
  elif [ -x "$here/../.venv/bin/python" ]; then echo "$here/../.venv/bin/python"
  else command -v python3; fi
}

gpus() { # how many this job may use
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[0-9]' || true
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  fi
}

cores() { nproc 2>/dev/null || sysctl -n hw.ncpu; }

refuse() { echo "error: $1" >&2; exit 2; }

within() { # NAME VALUE LEAST MOST: refuse all but whole numbers in this range
  [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] ||
    refuse "$1 is '$2': it must be a whole number from $3 to $4"
}

found=$(gpus)
NPROC=${NPROC:-$((found > 0 ? found : 2))}
NNODES=${NNODES:-1}
within NPROC "$NPROC" 1 4096
within NNODES "$NNODES" 1 1000000
threads=$(($(cores) / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

if [ "$NNODES" -gt 1 ]; then
  MASTER_PORT=${MASTER_PORT:-29500}
  within NODE_RANK "${NODE_RANK:-}" 0 $((NNODES - 1))
  within MASTER_PORT "$MASTER_PORT" 1 65535
  [ -n "${MASTER_ADDR:-}" ] ||
    refuse "MASTER_ADDR is empty: set the address of machine 0"
  where=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else # the own name of a laptop or a container may have no address
  where=(--standalone --local-addr 127.0.0.1)
fi

exec "${PYTHON:-$(python)}" "$here/torchrun.py" \
  "${where[@]}" --nproc-per-node "$NPROC" "$here/train.py" "$@"
