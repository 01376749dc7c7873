"""The whole HellaSwag validation set, predicted by us and by transformers.

    for by in "" --transformers; do
      python scripts/evaluate.py --hellaswag FILE $by \
          --predictions /tmp/whole$by.jsonl
    done
    python benchmarks/hellaswag_whole.py /tmp/whole.jsonl \
        /tmp/whole--transformers.jsonl

FILE holds the 10,042 published examples. The two runs take about 40 minutes
of one CPU core each. This script compares them and commits both, with sums
rounded to four digits, as benchmarks/results/hellaswag_val_*.jsonl, and what
they say as hellaswag_val.json.
"""

import argparse
from pathlib import Path

from llama_tut.hellaswag import (
    accuracy,
    mcnemar,
    read_predictions,
    write_predictions,
)
from llama_tut.tools.machine import RESULTS, write_result

KINDS = ("sum", "char", "token")


def rounded(predictions):
    """The same predictions, their sums with four digits."""
    return [
        p | {"scores": [round(s, 4) for s in p["scores"]]} for p in predictions
    ]


def summary(predictions):
    """Accuracy with its error and its 95 % interval, for the three scores."""
    rows = {}
    for kind in KINDS:
        a, error = accuracy(predictions, kind)
        rows[kind] = {
            "accuracy": round(a, 4),
            "standard_error": round(error, 4),
            "interval": [round(a + k * 1.96 * error, 4) for k in (-1, 1)],
        }
    return rows


def compare(ours, theirs):
    """How many predictions are the same, and how far the sums are apart."""
    return {
        "examples": len(ours),
        "same_predictions": {
            kind: sum(
                a[f"pred_{kind}"] == b[f"pred_{kind}"]
                for a, b in zip(ours, theirs, strict=True)
            )
            for kind in KINDS
        },
        "mcnemar": {kind: mcnemar(ours, theirs, kind) for kind in KINDS},
        "largest_difference": round(
            max(
                abs(x - y)
                for a, b in zip(ours, theirs, strict=True)
                for x, y in zip(a["scores"], b["scores"], strict=True)
            ),
            5,
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ours", type=Path)
    parser.add_argument("transformers", type=Path)
    args = parser.parse_args()
    found = {
        "llama_tut": read_predictions(args.ours),
        "transformers": read_predictions(args.transformers),
    }
    for name, predictions in found.items():
        path = RESULTS / f"hellaswag_val_{name}.jsonl"
        write_predictions(path, rounded(predictions))
    write_result(
        "hellaswag_val",
        {
            "what": "all published validation examples, SmolLM2-135M-Instruct "
            "in float32, one row for each example",
            **compare(*found.values()),
            "llama_tut": summary(found["llama_tut"]),
            "transformers": summary(found["transformers"]),
        },
    )


if __name__ == "__main__":
    main()
