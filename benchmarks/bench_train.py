"""Training speed: one switch per row, and beside transformers and litgpt.

    python benchmarks/bench_train.py [--part ladder] [--shape large]
        [--litgpt FOLDER] [--rounds 9] [--threads 1]

AdamW (fused) and clipping; random tokens. In every round each contender takes
one step in the same process, in random order; a ratio is that of the medians.
The ladder goes from plain eager float32 to everything that chapter 19 has, one
switch per row. The peers are ours, as `speed_up` leaves it, beside transformers
with each of its attentions that a CPU can train ("sdpa" is the default), and
beside litgpt where a folder has it, all from the same weights, in float32 and
bfloat16 autocast, eager and compiled. litgpt 0.5.13 wants packages that this project
does not; it goes into a folder of its own, and only this script reads it:

    pip install --no-deps --target FOLDER litgpt==0.5.13 lightning \\
        lightning-utilities torchmetrics jsonargparse

Writes benchmarks/results/train_speed.json (ladder) and train_peers.json, each
shape under its name.
"""

import random
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from llama_tut.attention import LlamaAttention
from llama_tut.config import LlamaConfig
from llama_tut.fast.training import blocked_attention, head_loss, speed_up
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools import cli
from llama_tut.tools.files import read_json, require
from llama_tut.tools.machine import RESULTS, write_result

# B, T, and the model.
SHAPES = {
    "small": (16, 256, LlamaConfig(4096, 256, 768, 6, 8, 4)),
    "large": (2, 1024, LlamaConfig(32_000, 512, 1536, 6, 8, 4)),
}
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


def litgpt_loss(call, x, y):
    return F.cross_entropy(call(x).flatten(0, 1), y.flatten())


def build_litgpt(config, T, weights):
    """litgpt's model with our weights; its folder is on sys.path."""
    from litgpt.config import Config
    from litgpt.model import GPT

    c = config
    model = GPT(
        Config(
            name="as ours",
            block_size=T,
            vocab_size=c.vocab_size,
            padded_vocab_size=c.vocab_size,
            n_layer=c.num_hidden_layers,
            n_head=c.num_attention_heads,
            n_query_groups=c.num_key_value_heads,
            n_embd=c.hidden_size,
            head_size=c.head_dim,
            intermediate_size=c.intermediate_size,
            rotary_percentage=1.0,
            rope_base=int(c.rope_theta),
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=c.rms_norm_eps,
            mlp_class_name="LLaMAMLP",
        )
    )
    names = {
        "lm_head.weight": "lm_head.weight",
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
    }
    parts = {
        "norm_1": "input_layernorm",
        "attn.proj": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    joined = {}
    for i in range(c.num_hidden_layers):
        for one, other in parts.items():
            names[f"transformer.h.{i}.{one}.weight"] = (
                f"model.layers.{i}.{other}.weight"
            )
        three = (f"model.layers.{i}.self_attn.{x}_proj.weight" for x in "qkv")
        joined[f"transformer.h.{i}.attn.qkv.weight"] = torch.cat(
            [weights[name] for name in three]
        )
    model.load_state_dict({k: weights[v] for k, v in names.items()} | joined)
    return model


def build(kind, dtype, shape, weights):
    """A model of one kind with these weights, and how to ask for its loss."""
    _, T, config = shape
    if kind == "litgpt":
        return build_litgpt(config, T, weights), litgpt_loss
    if kind.startswith("transformers"):
        hf = transformers.LlamaConfig(**config.to_hf(), use_cache=False)
        hf._attn_implementation = kind.split()[1]
        model, loss = transformers.LlamaForCausalLM(hf), their_loss
    else:
        model, loss = LlamaForCausalLM(config), our_loss
    model.load_state_dict(weights)
    if kind == "ours":
        speed_up(model, "cpu", getattr(torch, dtype))
    for module in model.modules():
        if "blocks" in kind and isinstance(module, LlamaAttention):
            module.attend = blocked_attention
    if "tiles" in kind:
        model.compute_loss = head_loss
    return model, loss


def mode_of(dtype, compiled):
    return f"{dtype} {'compiled' if compiled else 'eager'}"


class Contender:
    """One kind of model in one mode, with an optimizer of its own."""

    def __init__(self, kind, dtype, compiled, shape, weights):
        self.kind, self.mode = kind, mode_of(dtype, compiled)
        self.model, self.loss_of = build(kind, dtype, shape, weights)
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

    def tokens_per_second(self, shape):
        return round(shape[0] * shape[1] / statistics.median(self.seconds), 1)


def first_weights(shape):
    torch.manual_seed(0)
    return LlamaForCausalLM(shape[2]).state_dict()


def texts(number, shape):
    """Random inputs and targets, always the same."""
    B, T, config = shape
    random = torch.Generator().manual_seed(1)
    for _ in range(number):
        ids = torch.randint(config.vocab_size, (B, T + 1), generator=random)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def race(runners, rounds, shape, warm_up=2):
    """Let each take a step in turn; forget the first rounds.

    Every round has an order of its own, so that nobody always follows the
    same neighbour.
    """
    order = random.Random(0)
    for number, (x, y) in enumerate(texts(rounds + warm_up, shape), start=1):
        for runner in order.sample(runners, len(runners)):
            runner.step(x, y)
        print(f"round {number} of {rounds + warm_up}", flush=True)
    for runner in runners:
        runner.seconds = runner.seconds[warm_up:]


def ladder(rounds, shape):
    """The rows of the ladder: speed, memory, and what changes in the loss."""
    weights = first_weights(shape)
    runners = [Contender(*row[1:], shape, weights) for row in LADDER]
    race(runners, rounds, shape)
    ((x, y),) = texts(1, shape)
    rows = []
    for (row, *_), runner in zip(LADDER, runners, strict=True):
        pairs = zip(runner.losses, runners[0].losses, strict=True)
        rows.append(
            {
                "row": row,
                "tokens_per_second": runner.tokens_per_second(shape),
                "kept_mib": round(runner.kept_mib(x, y), 1),
                "largest_loss_difference": max(abs(a - b) for a, b in pairs),
                "seconds": [round(s, 4) for s in runner.seconds],
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "seconds"})
    return rows


def peers(rounds, shape, litgpt):
    """Ours and theirs, mode by mode; all must begin at the same loss."""
    kinds = ["ours", "transformers sdpa", "transformers eager"]
    if litgpt:
        kinds.append("litgpt")
    weights = first_weights(shape)
    runners = [
        Contender(kind, dtype, compiled, shape, weights)
        for compiled in (False, True)
        for dtype in ("float32", "bfloat16")
        for kind in kinds
    ]
    race(runners, rounds, shape)
    first = runners[0].losses[0]
    assert all(abs(r.losses[0] - first) < 0.02 for r in runners)
    speed = {}
    for r in runners:
        modes = speed.setdefault(r.kind, {})
        modes[r.mode] = r.tokens_per_second(shape)
        print(f"{r.kind:20} {r.mode:18}{modes[r.mode]:9,.0f} tokens/s")
    ratio = {}
    for dtype in ("float32", "bfloat16"):
        for mode in (mode_of(dtype, False), mode_of(dtype, True)):
            best = max(speed[kind][mode] for kind in kinds[1:])
            ratio[mode] = round(speed["ours"][mode] / best, 3)
        best = {
            kind: max(v for m, v in speed[kind].items() if m.startswith(dtype))
            for kind in kinds
        }
        theirs = max(best[kind] for kind in kinds[1:])
        ratio[f"{dtype}, best of each"] = round(best["ours"] / theirs, 3)
    print(ratio)
    B, T, config = shape
    return {
        "batch": B,
        "sequence_length": T,
        "model": config.to_hf(),
        "tokens_per_second": speed,
        "ratio_to_best_peer": ratio,
        "seconds": {
            f"{r.kind}, {r.mode}": [round(s, 4) for s in r.seconds]
            for r in runners
        },
        "losses": {
            f"{r.kind}, {r.mode}": [round(x, 4) for x in r.losses]
            for r in runners
        },
    }


def import_litgpt_from(folder):
    """Make `litgpt.model` importable, without what litgpt itself imports."""
    inside = Path(folder) / "litgpt"
    require(
        (inside / "model.py").exists(),
        f"--litgpt {folder}: no litgpt in it; the head of {__file__} says "
        "how to install it there",
    )
    package = types.ModuleType("litgpt")
    package.__path__ = [str(inside)]
    sys.modules["litgpt"] = package
    sys.path.append(str(folder))


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("ladder", "peers"), action="append")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--litgpt", metavar="FOLDER", help="where it is")
    args = parser.parse_args()
    require(args.rounds > 0, "--rounds must be at least 1")
    require(args.threads > 0, "--threads must be at least 1")
    torch.set_num_threads(args.threads)
    if args.litgpt:
        import_litgpt_from(args.litgpt)
    parts = args.part or ["ladder", "peers"]
    if "ladder" in parts:
        B, T, _ = SHAPES["small"]
        rows = ladder(args.rounds, SHAPES["small"])
        numbers = {"threads": args.threads, "batch": B, "sequence_length": T}
        write_result("train_speed", numbers | {"ladder": rows})
    if "peers" in parts:
        path = RESULTS / "train_peers.json"
        shapes = read_json(path)["shapes"] if path.exists() else {}
        for name in args.shape or SHAPES:
            torch._dynamo.reset()
            found = peers(args.rounds, SHAPES[name], args.litgpt)
            shapes[name] = {"threads": args.threads, **found}
            write_result("train_peers", {"shapes": shapes})


if __name__ == "__main__":
    cli.run(main)
