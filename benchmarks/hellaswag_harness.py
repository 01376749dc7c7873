"""Score HellaSwag examples with lm-evaluation-harness and write its answers to a result file.

    python -m venv /tmp/harness
    /tmp/harness/bin/pip install lm-eval==0.4.13 torch==2.13.0 transformers==5.24.0
    /tmp/harness/bin/python benchmarks/hellaswag_harness.py \
        --model FOLDER --file llama_tut/hellaswag_small.jsonl --out OUT.json

The harness is not among this project's requirements: its answers are
committed, and `tests/test_hellaswag.py` compares ours with them. FOLDER is a
Hugging Face folder; `python -c "from llama_tut.config import find_pretrained;
print(find_pretrained())"` prints that of the default model.
"""

import argparse
import hashlib
import json
import platform
import tempfile
import time
from pathlib import Path


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


def answers(samples):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--file", required=True, type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()

    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    lines = args.file.read_text().splitlines()[: args.limit]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "examples.jsonl"
        file.write_text("\n".join(lines) + "\n")
        model = HFLM(
            str(args.model),
            dtype="float32",
            device="cpu",
            batch_size=args.batch_size,
        )
        start = time.perf_counter()
        result = lm_eval.simple_evaluate(
            model, tasks=[task(file)], log_samples=True, bootstrap_iters=0
        )
    seconds = time.perf_counter() - start
    scores = result["results"]["hellaswag_file"]
    report = {
        "what": "HellaSwag by lm-evaluation-harness, float32 on a CPU",
        "model": args.model.name,
        "file": args.file.name,
        "examples": len(lines),
        "sha256_of_lines": hashlib.sha256(
            "\n".join(lines).encode()
        ).hexdigest(),
        "acc": scores["acc,none"],
        "acc_norm": scores["acc_norm,none"],
        "seconds": round(seconds, 1),
        "lm_eval": lm_eval.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "answers": answers(result["samples"]["hellaswag_file"]),
    }
    text = json.dumps(report, indent=1)
    args.out.write_text(text + "\n")
    print({k: v for k, v in report.items() if k != "answers"})


if __name__ == "__main__":
    main()
