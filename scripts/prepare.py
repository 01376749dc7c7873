"""Turn text into shards of tokens.

    python scripts/prepare.py --out data/docs
    python scripts/prepare.py --corpus book.txt --tokenizer gpt2 --out data/book
"""

import time

from cli import Parser, run

from llama_tut.config import InputError
from llama_tut.tokens import prepare


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--corpus",
        nargs="+",
        default=["docs"],
        metavar="docs|fineweb-edu|FILE",
        help="a corpus by name, or text, jsonl and parquet files or folders",
    )
    add(
        "--tokenizer",
        default="bpe",
        metavar="bpe|gpt2|FOLDER",
        help="train one, take GPT-2's, or one with a tokenizer.json",
    )
    add("--vocab-size", type=int, help="of a trained one (2048 if not given)")
    add("--out", required=True, help="the data folder to make")
    add("--max-tokens", type=int, help="stop after so many tokens")
    add("--shard-tokens", type=int, default=100_000_000, help="of a shard")
    add("--val-share", type=float, help="share of the text held out")
    add("--processes", type=int, help="workers (one a processor if not given)")
    args = parser.parse_args()
    for name in ("vocab_size", "max_tokens", "shard_tokens", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} {value}: must be at least 1")
    if args.val_share is not None and not 0 < args.val_share < 1:
        raise InputError(f"--val-share {args.val_share}: must be in (0, 1)")
    corpus = args.corpus
    if corpus[0] in ("docs", "fineweb-edu"):
        if len(corpus) > 1:
            raise InputError(f"--corpus {corpus[0]}: name it alone")
        corpus = corpus[0]
    start = time.perf_counter()
    info = prepare(
        corpus,
        args.out,
        args.tokenizer,
        args.vocab_size,
        args.max_tokens,
        args.shard_tokens,
        args.val_share,
        args.processes,
    )
    report(info, args.out, time.perf_counter() - start)


def report(info, out, seconds):
    """Print what was made."""
    size = info.train_bytes + info.val_bytes
    print(
        f"{out}: {info.train_tokens:,} tokens to train on in "
        f"{info.train_documents:,} documents, {info.val_tokens:,} to validate"
    )
    print(
        f"vocabulary {info.vocab_size:,}, {info.bytes_per_token:.3f} bytes a "
        f"token; {size / 1e6:.1f} MB of text in {seconds:.1f} s, "
        f"{size / 1e6 / seconds:.2f} MB/s"
    )
    for name in ("unigram", "bigram"):
        nats = getattr(info, f"{name}_nats")
        print(
            f"{name} floor {nats:.3f} nats a token, "
            f"{info.bits_per_byte(nats):.3f} bits a byte"
        )


if __name__ == "__main__":
    run(main)
