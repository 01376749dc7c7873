"""Training speed beside transformers' LlamaForCausalLM, in turn in one process.

    python benchmarks/bench_train.py [--rounds 9] [--threads 1]

One shape (V 4096, D 256, 6 layers, 8 heads, 4 kv heads, MLP 768), T 256, B 16,
AdamW (fused) and clipping, in float32 and bfloat16 autocast, eager and
compiled. In every round each contender takes one step; the ratio is that of the
medians. transformers runs as it comes, with PyTorch's attention kernel; its
plain "eager" attention, which compiles better in bfloat16 on some CPUs, runs
beside it. Writes benchmarks/results/train_speed.json.
"""

import argparse
import statistics
import time

import torch
import transformers

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.machine import write_result

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


def ours():
    """A function of ids and next ids that gives our loss, and its model."""
    model = LlamaForCausalLM(CONFIG)
    return model, lambda call, x, y: call(x, targets=y)


def theirs(attention="sdpa"):
    """The same for transformers; its loss is told that y is shifted."""
    hf = transformers.LlamaConfig(**CONFIG.to_hf(), use_cache=False)
    hf._attn_implementation = attention
    model = transformers.LlamaForCausalLM(hf)
    return (
        model,
        lambda call, x, y: call(input_ids=x, labels=y, shift_labels=y).loss,
    )


class Contender:
    """One implementation in one mode, with an optimizer of its own."""

    def __init__(self, name, build, dtype, compiled, weights):
        self.name = f"{name} {dtype} {'compiled' if compiled else 'eager'}"
        self.model, self.loss = build()
        self.model.load_state_dict(weights)
        self.call = torch.compile(self.model) if compiled else self.model
        self.bf16 = dtype == "bfloat16"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, weight_decay=0.1, fused=True
        )
        self.seconds, self.losses = [], []

    def step(self, x, y):
        """One training step; its seconds and its loss are kept."""
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.call, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def contenders():
    """Ours and theirs in the four modes, from the same first weights."""
    torch.manual_seed(0)
    weights = theirs()[0].state_dict()
    runners = [
        Contender(name, build, dtype, compiled, weights)
        for compiled in (False, True)
        for dtype in ("float32", "bfloat16")
        for name, build in (("ours", ours), ("transformers", theirs))
    ]
    plain = ("plain attention", lambda: theirs("eager"), "bfloat16", True)
    return [*runners, Contender(*plain, weights)]


def race(runners, rounds, warm_up=2):
    """Let each take a step in turn; forget the first rounds."""
    random = torch.Generator().manual_seed(1)
    for number in range(rounds + warm_up):
        ids = torch.randint(CONFIG.vocab_size, (B, T + 1), generator=random)
        for runner in runners:
            runner.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        print(f"round {number + 1} of {rounds + warm_up}", flush=True)
    for runner in runners:
        runner.seconds = runner.seconds[warm_up:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runners = contenders()
    race(runners, args.rounds)
    speed = {
        r.name: round(B * T / statistics.median(r.seconds), 1) for r in runners
    }
    best = max(v for k, v in speed.items() if k.startswith("transformers"))
    ratios = {
        mode: round(speed[f"ours {mode}"] / speed[f"transformers {mode}"], 3)
        for mode in (k.removeprefix("ours ") for k in speed if k[:4] == "ours")
    }
    fastest = speed["ours bfloat16 compiled"]
    headline = round(fastest / best, 3)
    plain = round(fastest / speed["plain attention bfloat16 compiled"], 3)
    for name, value in speed.items():
        print(f"{name:32}{value:9,.0f} tokens/s")
    print("ours over transformers, mode by mode:", ratios)
    print(f"ours bfloat16 compiled over their best mode: {headline}")
    print(f"over transformers with its plain attention: {plain}")
    write_result(
        "train_speed",
        {
            "threads": args.threads,
            "batch": B,
            "sequence_length": T,
            "tokens_per_second": speed,
            "ratio_by_mode": ratios,
            "ratio_to_their_best": headline,
            "ratio_to_their_plain_attention": plain,
            "seconds": {
                r.name: [round(s, 4) for s in r.seconds] for r in runners
            },
            "losses": {
                r.name: [round(v, 4) for v in r.losses] for r in runners
            },
        },
    )


if __name__ == "__main__":
    main()
