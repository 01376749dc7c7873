"""Tokenising: tokens per CPU-second beside a plain tiktoken loop, same ids.

    python benchmarks/bench_tokens.py [--rounds 5]

GPT-2's vocabulary, on the docstring corpus (`tiktoken` must find the vocabulary in
its cache or on the network). The text is cut into one part for each round, and
each contender encodes each part once, in turn: what an encoder remembers of the
words of earlier parts is part of its way. CPU-seconds are those of all threads
together. Writes benchmarks/results/tokens.json.
"""

import statistics
import time
from itertools import chain

from llama_tut.tools import cli
from llama_tut.tools.corpora import open_corpus
from llama_tut.tools.files import require
from llama_tut.tools.machine import write_result
from llama_tut.tools.tokenizers import (
    Encoder,
    for_documents,
    load_tiktoken,
    tokenizer_from_ranks,
)


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    require(args.rounds > 0, "--rounds must be at least 1")
    tiktoken = load_tiktoken()
    tokenizer = for_documents(tokenizer_from_ranks(tiktoken._mergeable_ranks))
    ours, slow = Encoder(tokenizer), Encoder(tokenizer)
    slow.twin = None
    contenders = {
        "tiktoken, a plain loop": lambda texts: [
            tiktoken.encode_ordinary(text) for text in texts
        ],
        "llama_tut": ours,
        "llama_tut without fastokens": slow,
    }
    texts = [text for _, text in open_corpus("docs").documents()]
    rates = {name: [] for name in contenders}
    for part in range(args.rounds):
        own = texts[part :: args.rounds]
        wanted = None
        for name, encode in contenders.items():
            began = time.process_time()
            found = encode(own)
            seconds = time.process_time() - began
            ids = list(chain.from_iterable(map(list, found)))
            wanted = wanted or ids
            assert ids == wanted, f"{name} gives other ids"
            rates[name].append(len(ids) / seconds)
    median = {name: statistics.median(rates[name]) for name in rates}
    first = next(iter(median.values()))
    for name, rate in median.items():
        print(f"{name:28} {rate / 1e6:6.2f} M tokens/s, {rate / first:.2f}")
    size = sum(len(text.encode()) for text in texts)
    ratio = {name: round(rate / first, 3) for name, rate in median.items()}
    write_result(
        "tokens",
        {"bytes": size, "tokens_per_second": rates, "ratio": ratio},
    )


if __name__ == "__main__":
    cli.run(main)
