"""Score the published HellaSwag rightly and with three faults, for chapter 10.

    python benchmarks/hellaswag_faults.py --hellaswag FILE [--limit 400]

FILE is jsonl of the published validation set, with `ctx` or `ctx_a`, `ctx_b`.
The result holds predictions, one digit an example, and no text.
"""

import argparse
import hashlib
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_tut.hellaswag import (
    accuracy,
    encode,
    packed_length,
    read_examples,
    score_items,
)
from llama_tut.tools.machine import write_result
from llama_tut.tools.pretrained import find_pretrained


def variants(tokenizer, examples):
    """{name: items}: how each example is made into tokens."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hellaswag", required=True)
    parser.add_argument("--limit", type=int, default=400)
    args = parser.parse_args()

    examples = read_examples(args.hellaswag, args.limit)
    folder = find_pretrained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {}
    for name, items in variants(tokenizer, examples).items():
        start = time.perf_counter()
        predictions = score_items(model, examples, items)
        answers[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            "tokens": sum(map(packed_length, items)),
            **{
                kind: "".join(str(p[f"pred_{kind}"]) for p in predictions)
                for kind in ("sum", "char", "token")
            },
        }
        for kind in ("sum", "char", "token"):
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


if __name__ == "__main__":
    main()
