"""Greedy generation beside transformers' `generate`, in turn in one process.

    python benchmarks/bench_generate.py [--compiled] [--rounds 5]

SmolLM2-135M, one row, 128 new tokens, one thread. Contenders run in turn on
each of several prompts; a ratio is that of the medians. `as_float32` says on
how many prompts all tokens equal transformers' float32 greedy ones. Compiling
takes some minutes and is not timed. Writes
benchmarks/results/generate_speed.json.
"""

import argparse
import copy
import statistics
import time
from functools import partial

import torch
from machine import write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_tut.config import find_pretrained
from llama_tut.generate import (
    Reader,
    generate,
    pack_weights,
    speculate,
    stream_greedy,
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


def checked(model, draft, ids, new):
    """Guess with the draft, check with the model."""
    return torch.cat(list(stream_greedy(model, draft, ids, new))).tolist()


class Compiled:
    """One compiled program for all prompts: the memory is made once."""

    def __init__(self, model, capacity, draft=None):
        self.reader = Reader(model, capacity, compiled=True)
        self.draft = draft and Reader(draft, capacity, compiled=True)

    def start(self, reader, ids):
        """Read the prompt uncompiled, all but its last token."""
        reader.length = ids.shape[1] - 1
        reader.plain_step(ids[:, :-1], torch.arange(reader.length))

    @torch.no_grad()
    def alone(self, ids, new):
        """Greedy, without a draft."""
        self.start(self.reader, ids)
        token, out = ids[:, -1:], []
        for _ in range(new):
            token = self.reader.read(token).argmax(-1)
            out.append(token.item())
        return out

    @torch.no_grad()
    def checked(self, ids, new):
        """Guess with the draft, check with the model."""
        self.start(self.reader, ids)
        self.start(self.draft, ids)
        out = []
        rounds = speculate(self.reader, self.draft, ids[:, -1:], AHEAD)
        while len(out) < new:
            out += next(rounds)[0].tolist()
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
    packed, draft = (
        pack_weights(copy.deepcopy(model)),
        pack_weights(copy.deepcopy(half)),
    )
    found["packed float32"] = partial(plain, packed)
    found["packed bfloat16"] = partial(plain, draft)
    found["guessed and checked"] = partial(checked, packed, draft)
    if compiled:
        one = Compiled(half, capacity)
        both = Compiled(model, capacity, half)
        found["compiled bfloat16"] = one.alone
        found["compiled, guessed and checked"] = both.checked
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
    seconds = {name: [] for name in runs}
    tokens = {name: [] for name in runs}
    for prompt in prompts:
        for name, run in runs.items():
            start = time.perf_counter()
            tokens[name].append(run(prompt, args.new))
            seconds[name].append(time.perf_counter() - start)
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
