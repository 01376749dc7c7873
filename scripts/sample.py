"""Continue a prompt with a model, and write the text as it comes.

python scripts/sample.py --prompt "The capital of France is"
python scripts/sample.py --model RUN/model --prompt "def " --temperature 0
python scripts/sample.py --chat --prompt "Why is the sky blue?"
python scripts/sample.py --temperature 0 --fast --prompt "def "
"""

import sys
import time

import torch
from models import add_model_options, load

from llama_tut.generate import (
    Bfloat16Linear,
    FastModel,
    check_request,
    check_sampling,
    four_bit_linear,
    stream,
    stream_greedy,
    text_pieces,
)
from llama_tut.tools.cli import Parser, run
from llama_tut.tools.files import require


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
    add("--chunk-size", type=int, help="prompt tokens a pass (None: all)")
    add(
        "--fast",
        action="store_true",
        help="the text so far and a four-bit copy guess ahead, the model "
        "checks: the same tokens, sooner in a long text (preparing takes a "
        "second or two); with --temperature 0 and on a CPU",
    )
    add("--stats", action="store_true", help="tokens a second, on stderr")
    return parser


def encode(tokenizer, prompt, chat):
    """The prompt's ids [1, T]."""
    if not chat:
        ids = tokenizer(prompt).input_ids
    else:
        require(
            tokenizer.chat_template,
            "this tokenizer has no chat template: leave --chat out",
        )
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids], dtype=torch.long)


def stop_tokens(config, tokenizer):
    """The ids that end a text, from the model's config and the tokenizer."""
    ids = config.eos_token_id
    ids = set(ids) if isinstance(ids, tuple) else {ids}
    return ids.union({tokenizer.eos_token_id}) - {None}


def check(args):
    """Find bad options before the model is loaded."""
    for name in ("max_new_tokens", "chunk_size"):
        value = getattr(args, name)
        option = "--" + name.replace("_", "-")
        require(value is None or value >= 1, f"{option} must be 1 or more")
    check_sampling(args.temperature, args.top_k, args.top_p)
    require(
        not args.fast or (args.temperature == 0 and args.device == "cpu"),
        "--fast guesses the likeliest token on a CPU: give --temperature 0 "
        "and leave --device out",
    )


def tokens_of(model, ids, new, stops, args):
    """The new tokens, one by one, as the options say."""
    if args.fast:
        draft = FastModel(model, four_bit_linear, Bfloat16Linear)
        return stream_greedy(FastModel(model), draft, ids, new, stops)
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
    args = build_parser().parse_args()
    check(args)
    model, tokenizer = load(args)
    ids = encode(tokenizer, args.prompt, args.chat).to(args.device)
    room = model.config.max_position_embeddings - ids.shape[1]
    new = args.max_new_tokens or max(1, min(100, room))
    check_request(model.config, ids, new)
    start, count = time.perf_counter(), 0
    stops = stop_tokens(model.config, tokenizer)
    tokens = tokens_of(model, ids, new, stops, args)
    if not args.chat:
        print(args.prompt, end="", flush=True)
    for piece in text_pieces(tokenizer, tokens, ids[0].tolist()):
        print(piece, end="", flush=True)
        count += 1
    print()
    if args.stats:
        rate = count / (time.perf_counter() - start)
        print(f"{count} tokens, {rate:.1f} a second", file=sys.stderr)


if __name__ == "__main__":
    run(main)
