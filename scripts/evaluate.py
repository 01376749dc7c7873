"""Score a model on HellaSwag: three accuracies, each with its standard error.

python scripts/evaluate.py
python scripts/evaluate.py --model RUN/model --hellaswag Rowan/hellaswag
python scripts/evaluate.py --hellaswag FILE --limit 200 --predictions a.jsonl
python scripts/evaluate.py --hellaswag FILE --limit 200 --compare a.jsonl
"""

import time
from pathlib import Path

from models import add_model_options, load

from llama_tut.fast.scoring import score_packed
from llama_tut.fast.training import speed_up
from llama_tut.hellaswag import (
    accuracy,
    read_examples,
    score,
    score_rows,
)
from llama_tut.tools.cli import Parser, run
from llama_tut.tools.files import require, write_jsonl
from llama_tut.tools.predictions import read_predictions
from llama_tut.tools.statistics import mcnemar

ROWS = {
    "sum": ("acc", "largest sum of log-probabilities"),
    "char": ("acc_norm", "largest mean a character"),
    "token": ("acc_token", "largest mean a token"),
}


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--hellaswag",
        metavar="FILE",
        help="a jsonl file, or Rowan/hellaswag for the published 10,042; "
        "None: the 48 examples of the package",
    )
    add("--limit", type=int, help="only the first so many examples")
    add("--batch-size", type=int, help="examples per pass (None: by device)")
    add("--predictions", metavar="OUT", type=Path, help="write them as jsonl")
    add("--compare", metavar="FILE", type=Path, help="McNemar's test with it")
    add(
        "--plain",
        "--four-rows",
        action="store_true",
        help="a row for each ending, as the harness does it, and matrices as "
        "they lie: slower; in float32 the same predictions",
    )
    add(
        "--transformers",
        action="store_true",
        help="let transformers compute the model, not llama_tut",
    )
    return parser


def check(args):
    """Find bad options before the model is loaded."""
    size = args.batch_size
    require(size is None or size >= 1, "--batch-size must be 1 or more")
    out = args.predictions
    if out is not None:
        require(not out.is_dir(), f"--predictions {out} is a folder")
        require(
            out.absolute().parent.is_dir(),
            f"--predictions {out}: there is no folder {out.parent}",
        )


def report(name, predictions, seconds):
    """Print what came out."""
    n = len(predictions)
    print(f"{name}: {n:,} examples, {n / seconds:.1f} a second")
    for kind, (title, meaning) in ROWS.items():
        a, error = accuracy(predictions, kind)
        print(f"{title:9} {a:.4f} +- {error:.4f}   {meaning}")


def compare(predictions, path, other):
    """Print McNemar's test for each of the three scores."""
    print(f"against {path}:")
    for kind, (title, _) in ROWS.items():
        b, c, p = mcnemar(predictions, other, kind)
        same = sum(
            x[f"pred_{kind}"] == y[f"pred_{kind}"]
            for x, y in zip(predictions, other, strict=True)
        )
        print(
            f"{title:9} right here only {b}, there only {c}, p {p:.3f}; "
            f"{same} of {len(other)} predictions are the same"
        )


def main():
    args = build_parser().parse_args()
    check(args)
    examples = read_examples(args.hellaswag, args.limit)
    other = read_predictions(args.compare) if args.compare else None
    require(
        other is None
        or [(p["index"], p["label"]) for p in other]
        == [(e.index, e.label) for e in examples],
        f"{args.compare} is about other examples than these",
    )
    model, tokenizer = load(args, args.transformers, packed=not args.plain)
    if not (args.plain or args.transformers):
        speed_up(model)  # in bfloat16 on a CPU another way of attention
    start = time.perf_counter()
    predictions = score(
        model,
        tokenizer,
        examples,
        batch_size=args.batch_size,
        score_batch=score_rows if args.plain else score_packed,
        progress=True,
    )
    seconds = time.perf_counter() - start
    report(args.model or "SmolLM2-135M-Instruct", predictions, seconds)
    if args.predictions:
        write_jsonl(args.predictions, predictions)
    if other:
        compare(predictions, args.compare, other)


if __name__ == "__main__":
    run(main)
