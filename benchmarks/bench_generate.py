"""Greedy generation beside transformers' `generate`, in turn in one process.

    python benchmarks/bench_generate.py [--compiled] [--rounds 5]

SmolLM2-135M, one row, 128 new tokens, one thread. Contenders run in turn on
each of several prompts; a ratio is that of the medians. With one thread the
clock counts processor time, which other programs disturb less. `as_float32`
says on how many prompts all tokens equal transformers' float32 greedy ones.
Compiling takes some minutes and is not timed. Writes
benchmarks/results/generate_speed.json.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from machine import write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_tut.config import find_pretrained
from llama_tut.generate import (
    FastModel,
    Reader,
    generate,
    pack_weights,
    speculate,
)
from llama_tut.hellaswag import read_examples
from llama_tut.weights import load_pretrained

AHEAD = 16


def theirs(model, ids, new):
    """transformers' own loop."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,  # as ours: no token ends the text
    )
    return out[0, ids.shape[1] :].tolist()


def plain(model, ids, new):
    """The loop of chapter 10."""
    return generate(model, ids, new)[0, ids.shape[1] :].tolist()


@torch.no_grad()
def greedy(reader, ids, new):
    """The likeliest token, again and again, without a draft."""
    reader.forget(0)
    logits, out = reader.read(ids[0].tolist())[-1], []
    for _ in range(new):
        out.append(logits.argmax().item())
        if len(out) < new:
            logits = reader.read(out[-1:])[0]
    return out


def checked(target, draft, ids, new):
    """Guess with the draft, check with the target."""
    target.forget(0)
    draft.forget(0)
    out = []
    rounds = speculate(target, draft, ids[0].tolist(), AHEAD)
    while len(out) < new:
        out += next(rounds)
    return out[:new]


def contenders(folder, capacity, compiled):
    """{name: function of ids and new that gives tokens}; theirs first."""
    load = AutoModelForCausalLM.from_pretrained
    found = {
        f"transformers {name}": partial(theirs, load(folder, dtype=dtype))
        for name, dtype in (
            ("float32", torch.float32),
            ("bfloat16", torch.bfloat16),
        )
    }
    model = load_pretrained(folder).eval()
    half = load_pretrained(folder, torch.bfloat16).eval()
    found["ours float32"] = partial(plain, model)
    found["packed float32"] = partial(
        plain, pack_weights(load_pretrained(folder).eval())
    )
    target, draft = (Reader(FastModel(m), capacity) for m in (model, half))
    found["fast float32"] = partial(greedy, target)
    found["fast bfloat16"] = partial(greedy, draft)
    found["guessed and checked"] = partial(checked, target, draft)
    if compiled:
        whole, quick = (
            Reader(FastModel(m, compiled=True), capacity)
            for m in (model, half)
        )
        found["compiled float32"] = partial(greedy, whole)
        found["compiled bfloat16"] = partial(greedy, quick)
        # The check stays uncompiled: many rows hide the small operators.
        found["compiled guesses, checked"] = partial(checked, target, quick)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="prompts")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = find_pretrained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer(e.context, return_tensors="pt").input_ids
        for e in read_examples(None, args.rounds)
    ]
    capacity = max(p.shape[1] for p in prompts) + args.new + 2 * AHEAD
    runs = contenders(folder, capacity, args.compiled)
    for name, run in runs.items():
        start = time.perf_counter()
        run(prompts[0], AHEAD + 2)  # warm up, compile
        print(f"{name}: {time.perf_counter() - start:.0f} s to start")
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds = {name: [] for name in runs}
    tokens = {name: [] for name in runs}
    for prompt in prompts:
        for name, run in runs.items():
            start = clock()
            tokens[name].append(run(prompt, args.new))
            seconds[name].append(clock() - start)
    first = next(iter(runs))
    base = statistics.median(seconds[first])
    rows = {}
    for name in runs:
        middle = statistics.median(seconds[name])
        alike = sum(map(list.__eq__, tokens[name], tokens[first]))
        rows[name] = {
            "tokens_per_second": round(args.new / middle, 1),
            "ratio": round(base / middle, 2),
            "as_float32": f"{alike} of {len(prompts)}",
            "seconds": [round(s, 3) for s in seconds[name]],
        }
        print(name, rows[name])
    write_result(
        "generate_speed",
        {"new_tokens": args.new, "threads": args.threads, "rows": rows},
    )


if __name__ == "__main__":
    main()
