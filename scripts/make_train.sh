#!/usr/bin/env bash
# `make train`: from nothing to a trained LLaMA, the whole way on one page.
#
# DATA and RUN choose other folders. A run that was stopped goes on; a finished
# one only shows its results again: remove RUN to train anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DATA=${DATA:-data/docs}
RUN=${RUN:-runs/laptop}

show() { # print a command, then run it
  printf '\n$ %s\n' "$*"
  "$@"
}

# 1. Text: the docstrings of Python and of ten packages installed here, cut
#    into 2,048 different tokens. About a minute; later runs find it done.
show python scripts/prepare.py --corpus docs --vocab-size 2048 --out "$DATA"

# 2. Training: a LLaMA of 1.3 million parameters, with the options of the last
#    record of chapter 19's speedrun, and for longer. One rank that has all cores
#    exchanges nothing; with GPUs or machines to spare, raise NPROC. Beside the
#    loss, how often it finds which of four windows goes on with a text.
show env NPROC=1 scripts/train_ddp.sh --preset laptop \
  --data "$DATA" --out "$RUN" --resume --steps 2400 \
  --micro-batch-size 16 --tokens-per-step 2048 --dtype auto \
  --optimizer muon --learning-rate 8e-3 --final-fraction 0 \
  --first-weights counts --no-tie-word-embeddings \
  --choice 500 --eval-every 400

# 3. What came out.
if [ ! -d "$RUN/model" ]; then
  echo "stopped before the end: the same command goes on"
  exit
fi
cat <<TEXT

$RUN/curves.png   the losses, the choices, and what needs no model
$RUN/model        a folder that transformers loads; to go on with it:
    .venv/bin/python scripts/sample.py --model $RUN/model --prompt "Return the"
TEXT
