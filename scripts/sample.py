"""Continue a prompt with a model, and write the text as it comes.

python scripts/sample.py --prompt "The capital of France is"
python scripts/sample.py --model RUN/model --prompt "def " --temperature 0
python scripts/sample.py --chat --prompt "Why is the sky blue?"
python scripts/sample.py --temperature 0 --fast --prompt "def "
"""

import sys
import time
from functools import partial

import torch
from models import add_model_options, load

from llama_tut.fast.generation import (
    FastModel,
    FastReader,
    RecordedReader,
    four_bit_draft,
)
from llama_tut.generate import stream, stream_guessing
from llama_tut.tools.cli import Parser, run
from llama_tut.tools.files import require
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.tools.prompts import (
    check_request,
    check_sampling,
    encode_chat,
    encode_prompt,
    stop_tokens,
    text_pieces,
)


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to continue")
    add("--chat", action="store_true", help="ask through the chat template")
    add("--max-new-tokens", type=int, help="None: 100, or what fits")
    add("--temperature", type=float, default=0.7, help="0: the likeliest")
    add("--top-k", type=int, help="draw from the k likeliest tokens only")
    add("--top-p", type=float, help="draw from the likeliest that sum to p")
    add("--seed", type=int, default=0, help="another seed, another text")
    add("--chunk-size", type=int, help="prompt tokens per pass (None: all)")
    add(
        "--fast",
        action="store_true",
        help="the text so far and, on a CPU, a four-bit copy guess ahead, the "
        "model checks: the same tokens, sooner in a long text (preparing takes "
        "a second or two); with --temperature 0, on a CPU or a CUDA GPU",
    )
    add(
        "--plain",
        action="store_true",
        help="one token per pass, matrices as they lie: slower; in float32 the "
        "same text",
    )
    add("--stats", action="store_true", help="tokens per second, on stderr")
    return parser


def encode(tokenizer, prompt, chat):
    """The prompt's ids [1, T]."""
    ids = (encode_chat if chat else encode_prompt)(tokenizer, prompt)
    return torch.tensor([ids], dtype=torch.long)


def check(args):
    """Find bad options before the model is loaded."""
    require(
        args.prompt.encode(errors="replace").decode() == args.prompt,
        "--prompt holds bytes that are no UTF-8",
    )
    for name in ("max_new_tokens", "chunk_size"):
        value = getattr(args, name)
        option = "--" + name.replace("_", "-")
        require(value is None or value >= 1, f"{option} must be 1 or more")
    check_sampling(args.temperature, args.top_k, args.top_p)
    require(
        -(2**63) <= args.seed < 2**64,
        f"--seed {args.seed}: must fit into 64 bits",
    )
    known = args.device.split(":")[0] in ("cpu", "cuda")
    require(
        not args.fast or (args.temperature == 0 and known),
        "--fast guesses the likeliest token on a CPU or a CUDA GPU: give "
        "--temperature 0, and --device cuda or none",
    )
    require(
        not (args.fast and args.plain), "--fast and --plain: give one of them"
    )


def tokens_of(model, ids, new, stops, args):
    """The new tokens, one by one, as the options say."""
    if args.fast:
        make = RecordedReader
        if ids.device.type == "cpu":
            make = partial(FastReader, draft=four_bit_draft(model))
        fast = FastModel(model)
        return stream_guessing(fast, ids, new, stops, make_reader=make)
    # Guessing from the text was measured to pay on a CPU, in float32.
    greedy = args.temperature == 0 and ids.device.type == "cpu"
    exact = model.output_weight.dtype == torch.float32
    if greedy and exact and not (args.plain or args.chunk_size):
        return stream_guessing(model, ids, new, stops)
    return stream(
        model,
        ids,
        max_new_tokens=new,
        stop_tokens=stops,
        chunk_size=args.chunk_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=torch.Generator(args.device).manual_seed(args.seed),
    )


def main():
    # A terminal that lacks a character shows "?" in its place.
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")
    args = build_parser().parse_args()
    check(args)
    args.model = find_pretrained(args.model)
    model, tokenizer = load(args, packed=not (args.plain or args.fast))
    require(
        not (args.fast and hasattr(model.config, "experts")),
        "--fast is not built for mixtures of experts: leave it out",
    )
    stops = stop_tokens(args.model, tokenizer)
    ids = encode(tokenizer, args.prompt, args.chat).to(args.device)
    room = model.config.max_position_embeddings - ids.shape[1]
    new = args.max_new_tokens or max(1, min(100, room))
    check_request(model.config, ids, new)
    start, count = time.perf_counter(), 1
    tokens = tokens_of(model, ids, new, stops, args)
    pieces = text_pieces(tokenizer, tokens, ids[0].tolist())
    first = next(pieces)  # nothing is printed before a damaged model is seen
    print(first if args.chat else args.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        count += 1
    print()
    if args.stats:
        rate = count / (time.perf_counter() - start)
        print(f"{count} tokens, {rate:.1f} a second", file=sys.stderr)


if __name__ == "__main__":
    run(main)
