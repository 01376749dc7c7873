"""Carry the training losses of five published runs into the book.

git clone https://github.com/hengjiUSTC/learn-llm
python benchmarks/published_losses.py learn-llm/pretrain

Writes notebooks/data/published_train_losses.csv.gz: a column a run, a line a
step, three decimals. Chapter 13 reads it; notebooks/data/README.md says what
it is.
"""

import gzip
from pathlib import Path

from llama_tut.tools import cli

OUT = Path(__file__).resolve().parent.parent / "notebooks" / "data"
# The Mixtral folders name their accumulation steps, hence their ranks.
RUNS = {
    "llama_24_12_6": "log_24_12_6_*",
    "mixtral_10_8_8": "log_mix_*layer(10)*gradacc(2)*",
    "llama_12_12_12": "log_12_12_12_*",
    "llama_16_12_6": "log_16_12_6_*",
    "mixtral_12_12_4": "log_mix_*layer(12)*gradacc(1)*",
}


def train_losses(log):
    """The losses of a log with lines `STEP train LOSS`, in order of steps."""
    lines = [line.split() for line in log.read_text().splitlines()]
    pairs = [(int(x[0]), float(x[2])) for x in lines if x[1] == "train"]
    steps, losses = zip(*pairs, strict=True)
    if list(steps) != list(range(len(steps))):
        raise SystemExit(f"{log}: its steps are not 0, 1, 2, ...")
    return losses


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", type=Path, help="learn-llm/pretrain")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    columns = []
    for name, pattern in RUNS.items():
        logs = [p / "log.txt" for p in args.logs.glob(pattern)]
        if len(logs) != 1:
            raise SystemExit(f"{args.logs}: {len(logs)} logs of {name}")
        columns.append(train_losses(logs[0]))
    lines = [",".join(RUNS)]
    for row in zip(*columns, strict=True):
        lines.append(",".join(f"{loss:.3f}" for loss in row))
    text = "\n".join(lines) + "\n"
    path = args.out / "published_train_losses.csv.gz"
    # No time stamp: the same logs give the same bytes.
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{path}: {len(lines) - 1:,} steps of {len(RUNS)} runs")


if __name__ == "__main__":
    cli.run(main)
