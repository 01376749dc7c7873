"""HellaSwag speed beside lm-evaluation-harness's way, in turn in one process.

    python benchmarks/bench_hellaswag.py --file FILE [--limit 96] [--threads 1]

The harness's way, as in `HFLM._loglikelihood_tokens` of lm-evaluation-harness
0.4.13: transformers' model in float32, one row for each ending, sorted by
length, sixteen rows a batch, log-softmax of all logits. Ours: `score_items`
in float32 and bfloat16, with the matrices as they lie and in oneDNN's order
(chapter 11). The examples are split into groups; in every group
each contender scores the same examples, and the ratio is that of the medians.
Writes benchmarks/results/hellaswag_speed.json.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_tut.generate import pack_weights
from llama_tut.hellaswag import (
    accuracy,
    encode,
    predict,
    read_examples,
    score_items,
)
from llama_tut.tools.machine import write_result
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained


@torch.no_grad()
def harness_way(model, examples, items, rows_at_once=16):
    """Predictions as the harness computes them."""
    rows = [
        (i, j, context, ending)
        for i, (context, endings) in enumerate(items)
        for j, ending in enumerate(endings)
    ]
    rows.sort(key=lambda row: -len(row[2] + row[3]))
    sums = [[0.0] * 4 for _ in items]
    for start in range(0, len(rows), rows_at_once):
        batch = rows[start : start + rows_at_once]
        inputs = [torch.tensor((c + e)[:-1]) for _, _, c, e in batch]
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        logp = torch.log_softmax(model(ids).logits, dim=-1)
        for (i, j, _, ending), row, one in zip(
            batch, inputs, logp, strict=True
        ):
            tail = one[len(row) - len(ending) : len(row)]
            target = torch.tensor(ending)[:, None]
            sums[i][j] = tail.gather(1, target).sum().item()
    return [
        predict(e, s, [len(x) for x in item[1]])
        for e, s, item in zip(examples, sums, items, strict=True)
    ]


def contenders(folder):
    """{name: function of examples and items that gives predictions}."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {"harness's way, float32": lambda e, i: harness_way(theirs, e, i)}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_pretrained(folder, dtype).eval()
        name = f"packed, {str(dtype).removeprefix('torch.')}"
        found[name] = lambda e, i, model=model: score_items(model, e, i)
        other = pack_weights(load_pretrained(folder, dtype).eval())
        found[f"{name}, oneDNN"] = lambda e, i, model=other: score_items(
            model, e, i
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", help="a jsonl file (None: our 48)")
    parser.add_argument("--limit", type=int, default=96)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = find_pretrained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = read_examples(args.file, args.limit)
    items = [encode(tokenizer, example) for example in examples]
    runs = contenders(folder)
    seconds = {name: [] for name in runs}
    found = {name: [] for name in runs}
    for run in runs.values():
        run(examples[:2], items[:2])  # warm up
    for start in range(0, len(examples), args.group):
        part = slice(start, start + args.group)
        for name, run in runs.items():
            begin = time.perf_counter()
            found[name] += run(examples[part], items[part])
            seconds[name].append(time.perf_counter() - begin)
    first = next(iter(runs))
    base = statistics.median(seconds[first])
    rows = {}
    for name in runs:
        middle = statistics.median(seconds[name])
        pairs = list(zip(found[name], found[first], strict=True))
        rows[name] = {
            "examples_per_second": round(args.group / middle, 2),
            "ratio": round(base / middle, 2),
            "same_predictions": {
                kind: sum(
                    a[f"pred_{kind}"] == b[f"pred_{kind}"] for a, b in pairs
                )
                for kind in ("sum", "char", "token")
            },
            "largest_difference": round(
                max(
                    abs(x - y)
                    for a, b in pairs
                    for x, y in zip(a["scores"], b["scores"], strict=True)
                ),
                4,
            ),
            "acc": round(accuracy(found[name])[0], 4),
            "acc_norm": round(accuracy(found[name], "char")[0], 4),
        }
        print(name, rows[name])
    write_result(
        "hellaswag_speed",
        {"examples": len(examples), "threads": args.threads, "rows": rows},
    )


if __name__ == "__main__":
    main()
