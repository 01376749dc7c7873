"""Turn text into shards of tokens.

python scripts/prepare.py --out data/docs
python scripts/prepare.py --corpus a.txt b.jsonl --tokenizer gpt2 --out data/mine
python scripts/prepare.py --corpus digits --tokenizer runs/laptop/model --out data/digits
"""

import time

from llama_tut.tools.cli import Parser, run
from llama_tut.tools.files import require
from llama_tut.tools.pictures import CORPORA, prepare_pictures
from llama_tut.tools.prepare import prepare


def parse():
    """The command line, as arguments of `prepare`."""
    parser = Parser(description=__doc__.split("\n")[0], argument_default=None)
    add = parser.add_argument
    add(
        "--corpus",
        nargs="+",
        default=["docs"],
        metavar="docs|fineweb-edu|digits|words|FILE",
        help="docstrings, FineWeb-Edu, or text, jsonl and parquet files "
        "(.gz, .bz2, .xz, .zst too), folders and patterns; or pictures, of "
        "handwritten digits or of words (chapter 27)",
    )
    add(
        "--tokenizer",
        default="bpe",
        metavar="bpe|gpt2|FOLDER",
        help="train one, take GPT-2's, or a folder's tokenizer.json",
    )
    add(
        "--vocab-size", type=int, metavar="N", help="of bpe; 2048 if not given"
    )
    add("--out", required=True, metavar="DIR", help="the data folder to make")
    add(
        "--max-tokens", type=int, metavar="N", help="stop after so many tokens"
    )
    add(
        "--shard-tokens",
        type=int,
        metavar="N",
        default=100_000_000,
        help="tokens in a shard",
    )
    add(
        "--val-share",
        type=float,
        metavar="X",
        help="of the documents, held out: 0.05 of files, 0.005 of FineWeb-Edu",
    )
    add(
        "--text-column",
        metavar="NAME",
        help="of jsonl and parquet files, where the text is; text",
    )
    add("--processes", type=int, metavar="N", help="workers; all processors")
    return vars(parser.parse_args())


def main():
    options = parse()
    corpus, out = options.pop("corpus"), options.pop("out")
    processes = options["processes"]
    require(
        processes is None or 1 <= processes <= 1024,
        "--processes: must be from 1 to 1024",
    )
    start = time.perf_counter()
    if len(corpus) == 1 and corpus[0] in CORPORA:
        tokenizer = options["tokenizer"]
        require(
            tokenizer not in ("bpe", "gpt2"),
            "pictures need the tokenizer of the model that will read them: "
            "--tokenizer RUN/model",
        )
        for name in ("vocab_size", "max_tokens", "val_share", "text_column"):
            option = "--" + name.replace("_", "-")
            require(options[name] is None, f"{option} is not for pictures")
        info = prepare_pictures(corpus[0], tokenizer, out)
        report_pictures(info, out, time.perf_counter() - start)
        return
    if len(corpus) == 1 and corpus[0] in ("docs", "fineweb-edu"):
        corpus = corpus[0]
    info = prepare(corpus, out, **options)
    report(info, out, time.perf_counter() - start)


def report_pictures(info, out, seconds):
    """Print what was made of pictures."""
    print(
        f"{out}: pictures of {info.corpus}, {info.train_documents:,} to train "
        f"on and {info.val_documents:,} held out, in {seconds:.1f} s"
    )
    print(
        f"answers of {info.train_tokens / info.train_documents:.1f} tokens "
        f"with their end; some pictures as files in {out}/examples"
    )


def report(info, out, seconds):
    """Print what was made."""
    size = (info.train_bytes + info.val_bytes) / 1e6
    rows = [
        f"{out}: {info.corpus}, {info.tokenizer}, {info.vocab_size:,} tokens",
        f"training text    {info.train_tokens:13,} tokens in "
        f"{info.train_documents:,} documents, {info.train_shards} shards",
        f"validation text  {info.val_tokens:13,} tokens in "
        f"{info.val_documents:,} documents",
        f"{info.bytes_per_token:.3f} bytes per token; {size:.1f} MB of text "
        f"in {seconds:.1f} s, {size / seconds:.2f} MB/s",
    ]
    for name in ("unigram", "bigram"):
        nats = getattr(info, f"{name}_nats")
        bits = info.bits_per_byte(nats)
        rows.append(
            f"{name + ' baseline':17} {nats:.3f} nats per token, "
            f"{bits:.3f} bits per byte"
        )
    print("\n".join(rows))


if __name__ == "__main__":
    run(main)
