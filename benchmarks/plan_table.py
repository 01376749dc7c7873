"""Plans of LLaMA 3 for chapter 25: one process, one core, no GPU.

python benchmarks/plan_table.py    writes benchmarks/results/plan.json
"""

import time
from collections import defaultdict
from dataclasses import replace
from functools import partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from llama_tut.plan import Setup, make_plan, rehearse
from llama_tut.tools import cli
from llama_tut.tools.machine import write_result
from llama_tut.tools.plans import GPUS, LLAMA3

aten = torch.ops.aten
KEPT = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.c10d._reduce_scatter_base_.default,
}

# torchtitan's benchmarks of December 2024, tables 1 and 3: tokens per second of
# a GPU without and with torch.compile, GiB without
PUBLISHED = {
    8: {"tokens_per_second": 5762, "compiled": 6667, "gib": 82.4},
    128: {"tokens_per_second": 5605, "compiled": 6514, "gib": 67.0},
}
TITAN_GPU = replace(GPUS["H100"], bandwidth=2.4e12)
# Table 4: 70B on 256 GPUs, with 8-bit products and sequence parallelism
PUBLISHED_70B = {"tokens_per_second": 829, "gib": 71.9}


def keep_half(model):
    """Keep attention and every second product of a layer, as torchtitan."""

    def contexts():
        products = defaultdict(int)

        def policy(context, func, *args, **kwargs):
            keep = func in KEPT
            if func == aten.mm.default:
                products[context.is_recompute] += 1
                keep = products[context.is_recompute] % 2 == 1
            if keep:
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    for layer in model.model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=contexts
        )


def without_history(made):
    """A plan without its timeline, which is long."""
    return {k: v for k, v in made.items() if k not in ("timeline", "turn")}


def torchtitan(config):
    """Their two runs of 8B, and what bounds them."""
    rows = {"bounds": {}}
    for gpus, published in PUBLISHED.items():
        setup = Setup(gpus, micro_batch_size=2, plain=True)
        made = make_plan(config, setup, TITAN_GPU, keep_half)
        rows[gpus] = {"plan": without_history(made), "published": published}
        both = {
            name: rehearse(config, replace(setup, recompute=again))
            for name, again in (("kept", False), ("recomputed", True))
        }
        rows["bounds"][gpus] = {
            name: meter.ledger.peak.total() for name, meter in both.items()
        }
    return rows


def seventy():
    """70B on torchtitan's mesh, in bfloat16 and without cut streams."""
    setup = Setup(256, 8, micro_batch_size=16, recompute=True, plain=True)
    made = make_plan(LLAMA3["llama3-70b"], setup, TITAN_GPU)
    return {"plan": without_history(made), "published": PUBLISHED_70B}


def main():
    cli.Parser(description=__doc__.split("\n")[0]).parse_args()
    eight = LLAMA3["llama3-8b"]
    first = make_plan(eight, Setup(8), GPUS["H100"])
    result = {
        "timeline": {k: first[k] for k in ("timeline", "turn")},
        "torchtitan": torchtitan(eight),
        "seventy": seventy(),
        "layers": {},
        "table": [],
    }
    for layers in (2, 4, 8, 24, 48, 126):
        config = replace(LLAMA3["llama3-405b"], num_hidden_layers=layers)
        meter = rehearse(config, Setup(512, 8, recompute=True))
        result["layers"][layers] = meter.ledger.peak.total()
    for model in ("llama3-8b", "llama3-70b", "llama3-405b"):
        tensor_parallel = 1 if model == "llama3-8b" else 8
        for gpus in (8, 64, 512):
            start = time.time()
            setup = Setup(gpus, tensor_parallel, recompute=True)
            made = make_plan(LLAMA3[model], setup, GPUS["H100"])
            row = {"model": model, "gpus": gpus}
            row["tensor_parallel"] = tensor_parallel
            row["plan"] = without_history(made)
            row["minutes"] = round((time.time() - start) / 60, 2)
            result["table"].append(row)
            print(
                model, gpus, f"{made['peak_bytes'] / 1e9:.1f} GB", flush=True
            )
    write_result("plan", result)


if __name__ == "__main__":
    cli.run(main)
