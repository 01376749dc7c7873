"""HellaSwag: how fast, how faulty, as the harness, and the whole set.

    python benchmarks/bench_hellaswag.py speed [--file FILE] [--limit 96]
    python benchmarks/bench_hellaswag.py faults --file FILE [--limit 400]
    python benchmarks/bench_hellaswag.py whole OURS.jsonl TRANSFORMERS.jsonl
    /tmp/harness/bin/python benchmarks/bench_hellaswag.py harness \
        --model FOLDER --file FILE --out OUT.json

FILE is jsonl of the published validation set, with `ctx` or `ctx_a`, `ctx_b`.

speed  Beside lm-evaluation-harness's way, in turn in one process: as in
       `HFLM._loglikelihood_tokens` of version 0.4.13, transformers' model in
       float32, one row for each ending, sorted by length, sixteen rows per
       batch, log-softmax of all logits. Ours: plain and packed rows, float32
       and bfloat16, matrices as they lie and in oneDNN's order, which in
       bfloat16 goes with chapter 19's attention, as in scripts/evaluate.py. In
       every group of examples each contender scores the same ones; the ratio
       is that of the median seconds an example. Writes results/hellaswag_speed.json.
faults The first examples scored rightly and with three faults of the scorer.
       Writes predictions, one digit an example: results/hellaswag_faults.json.
whole  Compares the predictions of scripts/evaluate.py for all examples, with
       and without --transformers (some 40 minutes of one core each). Commits
       both, sums with four digits, as results/hellaswag_val_*.jsonl.gz.
harness  lm-evaluation-harness's own answers. It is not among this project's
       requirements, so it runs in an environment of its own:
           python -m venv /tmp/harness
           /tmp/harness/bin/pip install lm-eval==0.4.13 torch==2.13.0 \
               transformers==5.24.0
       FOLDER is a Hugging Face folder; `python -c "from
       llama_tut.tools.pretrained import find_pretrained;
       print(find_pretrained())"` prints that of the default model.
"""

import argparse
import hashlib
import json
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

KINDS = ("sum", "char", "token")


# speed


@torch.no_grad()
def harness_way(model, examples, items, rows_at_once=16):
    """Predictions as the harness computes them."""
    from llama_tut.hellaswag import predict

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
    from transformers import AutoModelForCausalLM

    from llama_tut.fast.generation import pack_weights
    from llama_tut.fast.scoring import score_packed
    from llama_tut.fast.training import speed_up
    from llama_tut.hellaswag import score_items, score_rows
    from llama_tut.weights import load_pretrained

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {"harness's way, float32": partial(harness_way, theirs)}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = load_pretrained(folder, dtype).eval()
        other = speed_up(pack_weights(load_pretrained(folder, dtype).eval()))
        for title, one, way in (
            (f"four rows, {name}", model, score_rows),
            (f"packed, {name}", model, score_packed),
            (f"packed, {name}, oneDNN", other, score_packed),
        ):
            found[title] = partial(score_items, one, score_batch=way)
    return found


def speed_row(found, reference, seconds, base):
    """What the result file says of one contender."""
    from llama_tut.hellaswag import accuracy

    pairs = list(zip(found, reference, strict=True))
    middle = statistics.median(seconds)
    return {
        "examples_per_second": round(1 / middle, 2),
        "ratio": round(base / middle, 2),
        **differences(pairs, 4),
        "acc": round(accuracy(found)[0], 4),
        "acc_norm": round(accuracy(found, "char")[0], 4),
    }


def differences(pairs, digits):
    """How many predictions are the same, and how far the sums are apart."""
    return {
        "same_predictions": {
            kind: sum(a[f"pred_{kind}"] == b[f"pred_{kind}"] for a, b in pairs)
            for kind in KINDS
        },
        "largest_difference": round(
            max(
                abs(x - y)
                for a, b in pairs
                for x, y in zip(a["scores"], b["scores"], strict=True)
            ),
            digits,
        ),
    }


def speed(args):
    from transformers import AutoTokenizer

    from llama_tut.hellaswag import encode, read_examples
    from llama_tut.tools.files import require
    from llama_tut.tools.machine import write_result
    from llama_tut.tools.pretrained import find_pretrained

    require(args.group > 0, "--group must be at least 1")
    require(args.threads > 0, "--threads must be at least 1")
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
            took = time.perf_counter() - begin
            seconds[name].append(took / len(examples[part]))
    first = next(iter(runs))
    base = statistics.median(seconds[first])
    rows = {
        name: speed_row(found[name], found[first], seconds[name], base)
        for name in runs
    }
    for name, row in rows.items():
        print(name, row)
    write_result(
        "hellaswag_speed",
        {"examples": len(examples), "threads": args.threads, "rows": rows},
    )


# faults


def variants(tokenizer, examples):
    """{name: items}: how each example is made into tokens."""
    from llama_tut.hellaswag import encode

    right = [encode(tokenizer, example) for example in examples]
    bos = tokenizer.bos_token_id
    return {
        "right": right,
        "no context": [
            encode(tokenizer, example._replace(context=""))
            for example in examples
        ],
        "second BOS": [(context + [bos], ends) for context, ends in right],
        "apart": [
            (
                tokenizer(example.context + " ").input_ids,
                tokenizer(list(example.endings)).input_ids,
            )
            for example in examples
        ],
    }


def faults(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llama_tut.fast.scoring import score_packed
    from llama_tut.hellaswag import accuracy, read_examples, score_items
    from llama_tut.tools.machine import write_result
    from llama_tut.tools.pretrained import find_pretrained

    examples = read_examples(args.file, args.limit)
    folder = find_pretrained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {}
    for name, items in variants(tokenizer, examples).items():
        start = time.perf_counter()
        predictions = score_items(
            model, examples, items, score_batch=score_packed
        )
        answers[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            **{
                kind: "".join(str(p[f"pred_{kind}"]) for p in predictions)
                for kind in KINDS
            },
        }
        for kind in KINDS:
            a, error = accuracy(predictions, kind)
            print(f"{name:10} {kind:5} {a:.4f} +- {error:.4f}", flush=True)
    text = "\n".join(" ".join((e.context, *e.endings)) for e in examples)
    write_result(
        "hellaswag_faults",
        {
            "what": "HellaSwag with faults of the scorer, float32 on a CPU",
            "model": folder.name,
            "examples": len(examples),
            "sha256_of_texts": hashlib.sha256(text.encode()).hexdigest(),
            "labels": "".join(str(e.label) for e in examples),
            "answers": answers,
        },
    )


# whole


def rounded(predictions):
    """The same predictions, their sums with four digits."""
    return [
        p | {"scores": [round(s, 4) for s in p["scores"]]} for p in predictions
    ]


def summary(predictions):
    """Accuracy with its error and its 95 % interval, for the three scores."""
    from llama_tut.hellaswag import accuracy

    rows = {}
    for kind in KINDS:
        a, error = accuracy(predictions, kind)
        rows[kind] = {
            "accuracy": round(a, 4),
            "standard_error": round(error, 4),
            "interval": [round(a + k * 1.96 * error, 4) for k in (-1, 1)],
        }
    return rows


def whole(args):
    from llama_tut.tools.files import write_jsonl
    from llama_tut.tools.machine import RESULTS, write_result
    from llama_tut.tools.predictions import read_predictions
    from llama_tut.tools.statistics import mcnemar

    found = {
        "llama_tut": read_predictions(args.ours),
        "transformers": read_predictions(args.transformers),
    }
    for name, predictions in found.items():
        path = RESULTS / f"hellaswag_val_{name}.jsonl.gz"
        write_jsonl(path, rounded(predictions))
    pairs = list(zip(*found.values(), strict=True))
    write_result(
        "hellaswag_val",
        {
            "what": "all published validation examples, SmolLM2-135M-Instruct "
            "in float32, one row for each example",
            "examples": len(pairs),
            **differences(pairs, 5),
            "mcnemar": {
                kind: mcnemar(*found.values(), kind) for kind in KINDS
            },
            "llama_tut": summary(found["llama_tut"]),
            "transformers": summary(found["transformers"]),
        },
    )


# harness


def task(file):
    """The harness's hellaswag task, on a local file of the same fields."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    def prepare(doc):
        query = preprocess(doc["activity_label"] + ": " + doc["ctx"])
        choices = [preprocess(ending) for ending in doc["endings"]]
        return {"query": query, "choices": choices, "gold": doc["label"]}

    return {
        "task": "hellaswag_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "process_docs": lambda docs: docs.map(prepare),
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
    }


def answers_of(samples):
    """One dictionary an example: what the harness predicted, and its sums."""
    rows = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        sums = [float(r[0]) for r in sample["filtered_resps"]]
        chars = [
            s / len(c)
            for s, c in zip(sums, sample["doc"]["choices"], strict=True)
        ]
        label = int(sample["doc"]["label"])
        row = {
            "index": sample["doc"]["ind"],
            "label": label,
            "pred_sum": sums.index(max(sums)),
            "pred_char": chars.index(max(chars)),
            "scores": [round(s, 4) for s in sums],
        }
        assert sample["acc"] == (row["pred_sum"] == label)
        assert sample["acc_norm"] == (row["pred_char"] == label)
        rows.append(row)
    return rows


def harness(args):
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM

    lines = Path(args.file).read_text().split("\n")[: args.limit]
    lines = [line for line in lines if line]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "examples.jsonl"
        file.write_text("\n".join(lines) + "\n")
        model = HFLM(
            str(args.model), dtype="float32", device="cpu", batch_size=16
        )
        start = time.perf_counter()
        result = lm_eval.simple_evaluate(
            model, tasks=[task(file)], log_samples=True, bootstrap_iters=0
        )
    seconds = time.perf_counter() - start
    scores = result["results"]["hellaswag_file"]
    text = "\n".join(lines)
    report = {
        "what": "HellaSwag by lm-evaluation-harness, float32 on a CPU",
        "model": args.model.name,
        "file": Path(args.file).name,
        "examples": len(lines),
        "sha256_of_lines": hashlib.sha256(text.encode()).hexdigest(),
        "acc": scores["acc,none"],
        "acc_norm": scores["acc_norm,none"],
        "seconds": round(seconds, 1),
        "lm_eval": lm_eval.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "answers": answers_of(result["samples"]["hellaswag_file"]),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print({k: v for k, v in report.items() if k != "answers"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(run):
        sub = commands.add_parser(run.__name__)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command(speed)
    add("--file", help="a jsonl file (None: our 48)")
    add("--limit", type=int, default=96)
    add("--group", type=int, default=128)
    add("--threads", type=int, default=1)
    add = command(faults)
    add("--file", required=True)
    add("--limit", type=int, default=400)
    add = command(whole)
    add("ours", type=Path)
    add("transformers", type=Path)
    add = command(harness)
    add("--model", required=True, type=Path)
    add("--file", required=True)
    add("--limit", type=int)
    add("--out", required=True, type=Path)
    args = parser.parse_args()
    if args.run is harness:  # its environment has no llama_tut
        return harness(args)
    from llama_tut.tools import cli

    cli.run(partial(args.run, args))


if __name__ == "__main__":
    main()
