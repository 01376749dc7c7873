"""Training speed: one switch per row, and beside transformers' LlamaForCausalLM.

    python benchmarks/bench_train.py [--rounds 9] [--threads 1] [--ladder]

One shape (V 4096, D 256, 6 layers, 8 heads, 4 kv heads, MLP 768), T 256, B 16,
AdamW (fused) and clipping. In every round each contender takes one step in the
same process; a ratio is that of the medians. The ladder goes from plain eager
float32 to everything that chapter 19 has, one switch per row. Then ours, as
`speed_up` leaves it, beside transformers in float32 and bfloat16 autocast,
eager and compiled; transformers runs as it comes, with PyTorch's attention
kernel, and its plain "eager" attention, which compiles better in bfloat16 on
some CPUs, runs beside it. Writes benchmarks/results/train_speed.json; with
--ladder only that part of it.
"""

import argparse
import statistics
import time

import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

from llama_tut.attention import LlamaAttention
from llama_tut.config import LlamaConfig
from llama_tut.fast.training import blocked_attention, head_loss, speed_up
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.files import read_json
from llama_tut.tools.machine import RESULTS, write_result

B, T = 16, 256
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=T,
)
# (row, which model, dtype, compiled): each switches one thing on.
LADDER = [
    ("plain, float32", "plain", "float32", False),
    ("bfloat16", "plain", "bfloat16", False),
    ("compiled", "plain", "bfloat16", True),
    ("attention in blocks", "blocks", "bfloat16", True),
    ("head loss in tiles", "blocks and tiles", "bfloat16", True),
]


def our_loss(call, x, y):
    return call(x, targets=y)


def their_loss(call, x, y):
    """transformers is told that y is shifted already."""
    return call(input_ids=x, labels=y, shift_labels=y).loss


def build(kind, dtype):
    """A model of one kind, and how to ask it for the loss."""
    if kind.startswith("transformers"):
        hf = transformers.LlamaConfig(**CONFIG.to_hf(), use_cache=False)
        hf._attn_implementation = "eager" if "plain" in kind else "sdpa"
        return transformers.LlamaForCausalLM(hf), their_loss
    model = LlamaForCausalLM(CONFIG)
    if kind == "ours":
        speed_up(model, "cpu", getattr(torch, dtype))
    for module in model.modules():
        if "blocks" in kind and isinstance(module, LlamaAttention):
            module.attend = blocked_attention
    if "tiles" in kind:
        model.compute_loss = head_loss
    return model, our_loss


class Contender:
    """One kind of model in one mode, with an optimizer of its own."""

    def __init__(self, kind, dtype, compiled, weights):
        self.name = f"{kind} {dtype} {'compiled' if compiled else 'eager'}"
        self.model, self.loss_of = build(kind, dtype)
        self.model.load_state_dict(weights)
        self.call = torch.compile(self.model) if compiled else self.model
        self.bf16 = dtype == "bfloat16"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True
        )
        self.seconds, self.losses = [], []

    def loss(self, x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.loss_of(self.call, x, y)

    def step(self, x, y):
        """One training step; its seconds and its loss are kept."""
        start = time.perf_counter()
        loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def kept_mib(self, x, y):
        """MiB that autograd keeps for the backward pass, without weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.parameters()}
        kept = {}

        def keep(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return t

        with saved_tensors_hooks(keep, lambda t: t):
            loss = self.loss(x, y)
        del loss
        return sum(s.nbytes() for s in kept.values()) / 2**20

    def parameters(self):
        return list(self.model.parameters())

    def tokens_per_second(self):
        return round(B * T / statistics.median(self.seconds), 1)


def first_weights():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).state_dict()


def texts(number):
    """Random inputs and targets, always the same."""
    random = torch.Generator().manual_seed(1)
    for _ in range(number):
        ids = torch.randint(CONFIG.vocab_size, (B, T + 1), generator=random)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def race(runners, rounds, warm_up=2):
    """Let each take a step in turn; forget the first rounds."""
    for number, (x, y) in enumerate(texts(rounds + warm_up), start=1):
        for runner in runners:
            runner.step(x, y)
        print(f"round {number} of {rounds + warm_up}", flush=True)
    for runner in runners:
        runner.seconds = runner.seconds[warm_up:]


def ladder(rounds):
    """The rows of the ladder: speed, memory, and what changes in the loss."""
    weights = first_weights()
    runners = [Contender(*row[1:], weights) for row in LADDER]
    race(runners, rounds)
    ((x, y),) = texts(1)
    rows = []
    for (row, *_), runner in zip(LADDER, runners, strict=True):
        pairs = zip(runner.losses, runners[0].losses, strict=True)
        rows.append(
            {
                "row": row,
                "tokens_per_second": runner.tokens_per_second(),
                "kept_mib": round(runner.kept_mib(x, y), 1),
                "largest_loss_difference": max(abs(a - b) for a, b in pairs),
                "seconds": [round(s, 4) for s in runner.seconds],
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "seconds"})
    return rows


def beside_transformers(rounds):
    """Ours and theirs, mode by mode."""
    weights = first_weights()
    runners = [
        Contender(kind, dtype, compiled, weights)
        for compiled in (False, True)
        for dtype in ("float32", "bfloat16")
        for kind in ("ours", "transformers")
    ]
    plain = "transformers plain attention"
    runners.append(Contender(plain, "bfloat16", True, weights))
    race(runners, rounds)
    speed = {r.name: r.tokens_per_second() for r in runners}
    best = max(v for k, v in speed.items() if k.startswith("transformers"))
    fastest = speed["ours bfloat16 compiled"]
    for name, value in speed.items():
        print(f"{name:48}{value:9,.0f} tokens/s")
    return {
        "tokens_per_second": speed,
        "ratio_by_mode": {
            mode: round(
                speed[f"ours {mode}"] / speed[f"transformers {mode}"], 3
            )
            for mode in (k[5:] for k in speed if k.startswith("ours "))
        },
        "ratio_to_their_best": round(fastest / best, 3),
        "ratio_to_their_plain_attention": round(
            fastest / speed[f"{plain} bfloat16 compiled"], 3
        ),
        "seconds": {r.name: [round(s, 4) for s in r.seconds] for r in runners},
        "losses": {r.name: [round(v, 4) for v in r.losses] for r in runners},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ladder", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers = {"threads": args.threads, "batch": B, "sequence_length": T}
    if args.ladder and (RESULTS / "train_speed.json").exists():
        numbers |= read_json(RESULTS / "train_speed.json")
        del numbers["machine"]
    numbers["ladder"] = ladder(args.rounds)
    if not args.ladder:
        torch._dynamo.reset()
        numbers |= beside_transformers(args.rounds)
    write_result("train_speed", numbers)


if __name__ == "__main__":
    main()
