"""Measure everything that needs a GPU, in under nine minutes and without a network.

PYTHONPATH=. python benchmarks/gpu.py --out runs/gpu
PYTHONPATH=. python benchmarks/gpu.py --out runs/gpu_tiny --tiny    CPU, two minutes

Each part runs in a process of its own, with a time limit of its own, and
writes gpu_PART.json as it goes. So a part that fails or hangs costs its own
numbers only. Parts stand in the order of their value; copy their files to
benchmarks/results/ to have the book show them.
"""

import gc
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch.nn import functional as F

from llama_tut.tools import cli
from llama_tut.tools.files import (
    read_json,
    require,
    write_json,
    write_jsonl,
)
from llama_tut.tools.machine import describe
from llama_tut.tools.runs import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# Where a part finds modules: here, and where this process was told to look.
PATH = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))

# What a part gets


class Part:
    """Where a part writes, how large it may be, and how long it may take."""

    def __init__(self, name, args):
        self.path = args.out / f"gpu_{name}.json"
        self.out, self.tiny, self.rows = args.out, args.tiny, args.rows
        self.model, self.data = args.model, args.data
        self.tokenizer = args.tokenizer
        self.end = time.monotonic() + args.seconds
        cuda = torch.cuda.is_available() and not args.tiny
        self.device = torch.device("cuda" if cuda else "cpu")
        self.numbers = {"machine": describe(), "tiny": self.tiny}
        kept = args.rows and self.path.exists()
        self.numbers["results"] = (
            read_json(self.path)["results"] if kept else {}
        )

    def left(self):
        """Seconds until this part is ended."""
        return self.end - time.monotonic()

    def record(self, name, value):
        """Keep one result, and write all there are."""
        self.numbers["results"][name] = value
        write_json(self.path, self.numbers)
        print(f"{name}: {value}", flush=True)

    def attempt(self, name, measure, *args, least=0, **options):
        """Record what `measure` returns, or why it could not."""
        if self.rows and not any(fnmatch(name, row) for row in self.rows):
            return None
        if self.left() < least:
            return self.record(name, {"left out": f"{least} s are not left"})
        try:
            value = measure(*args, **options)
        except Exception as error:  # out of memory, no compiler, ...
            text = str(error).strip().splitlines() or [""]
            value = {"error": f"{type(error).__name__}: {text[0][:300]}"}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.record(name, value)


def synchronize(device):
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(work, device, rounds=10, warm_up=3):
    """The median time of a call, after a few that do not count."""
    seconds = []
    for _ in range(rounds + warm_up):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warm_up:])


def peak_bytes(work, device):
    """The most memory that PyTorch held during a call; None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


# What the machine can do at best


def ceilings(part):
    """The fastest bfloat16 product and the fastest copy."""
    device = part.device
    for n in (128, 256) if part.tiny else (4096, 8192, 16384):
        a = torch.randn(n, n, device=device).bfloat16()
        seconds = median_seconds(lambda a=a: a @ a, device)
        part.record(f"product {n}", {"flops_per_second": 2 * n**3 / seconds})
    size = 2**20 if part.tiny else 2**32
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    seconds = median_seconds(lambda: b.copy_(a), device)
    part.record("copy", {"bytes_per_second": 2 * size / seconds})


# The tests that need a GPU


def tests(part):
    """pytest -k cuda, in the files that have the word."""
    files = [ROOT / "tests" / "test_on_cuda.py"]
    if not part.tiny:
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        files = [file for file in files if "cuda" in file.read_text()]
    command = [
        *(sys.executable, "-m", "pytest", *map(str, files), "-k", "cuda"),
        *("-p", "no:cacheprovider", "--show-capture=no"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=max(part.left() - 2, 1),
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    counts = re.findall(
        r"(\d+) (passed|failed|skipped|errors?)", " ".join(lines[-3:])
    )
    part.record("exit code", done.returncode)
    part.record("counts", {word: int(count) for count, word in counts})
    part.record("last lines", lines[-20:])


# Training steps


def build(shape, V, T, device):
    """A model of that shape with random weights."""
    from llama_tut.config import LlamaConfig
    from llama_tut.model import LlamaForCausalLM

    config = LlamaConfig(vocab_size=V, max_position_embeddings=T, **shape)
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(config)


def cudnn_attention(q, k, v, attention_mask=None):
    """Chapter 5's `attend` by cuDNN's kernel, where there is one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from llama_tut.attention import attend

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return attend(q, k, v, attention_mask)


def swap(model, attention=None, loss=False):
    """Swap in another attention ("blocks", "cudnn"), the loss by tiles, or both."""
    from llama_tut.attention import LlamaAttention
    from llama_tut.fast.training import blocked_attention, head_loss

    kinds = {"blocks": blocked_attention, "cudnn": cudnn_attention}
    for module in model.modules():
        if attention and isinstance(module, LlamaAttention):
            module.attend = kinds[attention]
    if loss:
        model.compute_loss = head_loss


class Peer(torch.nn.Module):
    """transformers' model with the weights of ours, called like ours."""

    def __init__(self, model, device):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(**model.config.to_hf(), use_cache=False)
        config._attn_implementation = "sdpa"
        with device:
            self.inner = LlamaForCausalLM(config)
        self.inner.load_state_dict(model.state_dict(), strict=False)

    def forward(self, ids, targets):
        """ids [B, T], targets [B, T] -> mean loss []."""
        targets = targets.contiguous()
        given = {"labels": targets, "shift_labels": targets}
        return self.inner(input_ids=ids, **given).loss


def build_step(
    part, shape, V, T, B, compiled=False, peer=False, wrap=None, **swaps
):
    """(a function that takes a step and returns the loss, the model).

    Args:
        shape: of the model; V: vocabulary; T: tokens per row; B: rows per step.
        compiled: whether torch.compile makes the step; "parts": as training
            does, layers and loss by themselves.
        peer: whether transformers' model takes the step.
        wrap: called with the model, such as DDP.
        swaps: arguments of `swap`.
    """
    from llama_tut.optimizer import build_optimizer
    from llama_tut.tools.compilation import InParts

    device = part.device
    model = build(shape, V, T, device)
    swap(model, **swaps)
    callee = Peer(model, device) if peer else model
    optimizer = build_optimizer(callee)
    callee = wrap(callee) if wrap else callee
    # In tiny mode the compiler's path, but no code by it.
    backend = "aot_eager" if part.tiny else "inductor"
    if compiled == "parts":
        callee = InParts(callee, backend=backend)
    elif compiled:
        callee = torch.compile(callee, backend=backend)
    torch.manual_seed(1)  # the same tokens, whatever was built before
    ids = torch.randint(V, (B, T + 1), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = callee(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, model


def planned_bytes(model, T, B, device, compiled=False, loss=False, **_):
    """What the formula of chapter 18 says of a step."""
    from llama_tut.tools.memory import plan
    from llama_tut.tools.options import TrainConfig

    config = TrainConfig(
        sequence_length=T,
        micro_batch_size=B,
        tokens_per_step=B * T,
        compile=bool(compiled),
        plain=not loss,
    )
    return sum(plan(config, model, device, torch.bfloat16).values())


def training_speed(part, shape, V, T, B, **options):
    """Tokens per second, MFU and memory of whole steps in bfloat16.

    Args: as in `build_step`.
    """
    from llama_tut.tools.devices import peak_flops

    device = part.device
    take_step, model = build_step(part, shape, V, T, B, **options)
    losses = []

    def step():
        losses.append(take_step())

    began = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - began
    peak = peak_bytes(step, device)
    rounds = 2 if part.tiny else 10
    seconds = median_seconds(step, device, rounds, warm_up=1)
    found = {
        "tokens_per_second": B * T / seconds,
        "seconds_of_a_step": seconds,
        "seconds_of_the_first_step": first,
        "peak_bytes": peak,
        "planned_bytes": planned_bytes(model, T, B, device, **options),
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
        "batch": B,
        "sequence_length": T,
        "vocabulary": V,
    }
    most = peak_flops(device)
    if most:
        flops = model.flops_per_token(T) * B * T / seconds
        found["mfu"] = flops / most
    return found


def sizes(part, name):
    """(shape, V, T, B) of a model by its name; small ones in tiny mode."""
    from llama_tut.tools.options import SHAPES, llama_shape

    if part.tiny:
        return llama_shape(64, 128, 2, 2, tie_word_embeddings=True), 512, 64, 2
    one_billion = llama_shape(
        2048, 8192, 16, 32, num_key_value_heads=8, tie_word_embeddings=True
    )
    return {
        "124m": (SHAPES["124m"], 50_304, 1024, 32),
        "350m": (SHAPES["350m"], 50_304, 1024, 16),
        "1b": (one_billion, 128_256, 1024, 8),
    }[name]


LADDER = {
    "plain": {},
    "loss by tiles": {"loss": True},
    "attention by blocks": {"attention": "blocks"},
    "attention by cuDNN": {"attention": "cudnn"},
    "compiled": {"compiled": True},
    "compiled in parts": {"compiled": "parts"},
    "compiled in parts, loss by tiles": {"compiled": "parts", "loss": True},
    "compiled, attention by cuDNN": {"compiled": True, "attention": "cudnn"},
    "transformers": {"peer": True},
    "transformers, compiled": {"peer": True, "compiled": True},
    "transformers, compiled in parts": {"peer": True, "compiled": "parts"},
}


def training(part):
    """124M, T 1024: eager and compiled, each part by itself, and a peer."""
    for name, options in LADDER.items():
        least = 40 if options.get("compiled") is True else 0
        part.attempt(
            name,
            training_speed,
            part,
            *sizes(part, "124m"),
            least=0 if part.tiny else least,
            **options,
        )


def shapes(part):
    """350M and a 1B shape: plain, each switch, and both."""
    hows = "plain", "loss by tiles", "compiled in parts"
    hows = *hows, "compiled in parts, loss by tiles"
    plans = [(name, how) for name in ("350m", "1b") for how in hows]
    for name, how in [*plans, ("1b", "compiled")]:
        part.attempt(
            f"{name} {how}",
            training_speed,
            part,
            *sizes(part, name),
            least=70 if how == "compiled" and not part.tiny else 0,
            **LADDER[how],
        )


# Where the time of a step goes

KINDS = {
    "matrix products": "gemm|nvjet|cutlass|xmma|cublas",
    "attention": "flash|fmha|cudnn|sdpa",
    "optimizer": "multi_tensor|adam",
    "compiled by Triton": "triton",
}


def kernel_seconds(part, rounds=3, **options):
    """Seconds of a step by kind of kernel, from torch's profiler.

    On a CPU, where there are no kernels, by the operators' own time.
    """
    from torch.profiler import ProfilerActivity, profile

    step, _ = build_step(part, *sizes(part, "124m"), **options)
    seconds = median_seconds(step, part.device, rounds)
    cuda = part.device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(rounds):
            step()
        synchronize(part.device)
    kinds, kernels = dict.fromkeys([*KINDS, "other"], 0.0), []
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    for event in found.key_averages():
        own = getattr(event, time_of) / 1e6 / rounds
        name = event.key.lower()
        kind = (k for k, words in KINDS.items() if re.search(words, name))
        kinds[next(kind, "other")] += own
        kernels.append([event.key[:120], event.count / rounds, own])
    kernels.sort(key=lambda kernel: -kernel[2])
    return {
        "seconds_of_a_step": seconds,
        "seconds_by_kind": kinds,
        "kernels_of_a_step": sum(count for _, count, _ in kernels),
        "longest": kernels[:40],
    }


def profiles(part):
    """A step of 124M by kind of kernel: plain, and what is fastest."""
    for name in ("plain", "compiled in parts", "compiled"):
        least = 40 if name == "compiled" and not part.tiny else 0
        part.attempt(name, kernel_seconds, part, least=least, **LADDER[name])


# The loss alone


def loss_speed(part, V, D, rows, kind):
    """Milliseconds, forward and backward, and memory of the head's loss.

    Args:
        kind: "plain" on all logits, eager or "compiled"; "tiles", or "tiles
            eager" without the compiler's kernels; "torch" for PyTorch's own.
    """
    from llama_tut.fast import training as fast
    from llama_tut.model import next_token_loss

    device = part.device
    hidden = torch.randn(rows, D, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(V, D, device=device)).requires_grad_()
    targets = torch.randint(V, (rows,), device=device)
    backend = "aot_eager" if part.tiny else "inductor"

    def chunks(hidden, weight, targets):
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, options=options)

    loss = {
        "plain": next_token_loss,
        "compiled": torch.compile(next_token_loss, backend=backend),
        "torch": chunks,
    }.get(kind, fast.head_loss)

    def work():
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(hidden, weight, targets)
        value.backward()
        hidden.grad = weight.grad = None
        return value

    kernels = fast.log_sum_exp, fast.to_gradient
    if kind == "tiles eager":
        for kernel in kernels:
            kernel.fast = kernel.function
    try:
        work()
        peak = peak_bytes(work, device)
        seconds = median_seconds(work, device, 3 if part.tiny else 10, 1)
        return {
            "milliseconds": 1e3 * seconds,
            "peak_bytes": peak,
            "loss": work().item(),
        }
    finally:
        for kernel in kernels:
            kernel.fast = None


def head_loss(part):
    """Plain cross entropy, eager and compiled, against tiles."""
    rows = 64 if part.tiny else 16_384
    kinds = ["plain", "compiled", "tiles", "tiles eager"]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # since PyTorch 2.13
        kinds.append("torch")
    for V, D in (
        ((512, 32),) if part.tiny else ((50_304, 768), (128_256, 2048))
    ):
        for kind in kinds:
            name = f"V {V} {kind}"
            part.attempt(name, loss_speed, part, V, D, rows, kind)


# One rank of many


def run_script(part, name, *args):
    """Run a script of this project; its output. Raises when it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, args)],
        cwd=part.out,
        capture_output=True,
        text=True,
        timeout=max(part.left() - 2, 1),
        env={**os.environ, "PYTHONPATH": PATH, "TQDM_DISABLE": "1"},
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [""]
        raise RuntimeError(f"{name}: {said[-1]}")
    return done.stdout


def manual(part):
    """A data folder of the text that Python's help() shows; made once."""
    from pydoc_data.topics import topics

    data = part.out / "manual"
    if not (data / "dataset.json").exists():
        text = part.out / "manual.txt"
        text.write_text("\n\n".join(topics.values()), encoding="utf-8")
        run_script(
            part, "prepare.py", "--corpus", text, "--vocab-size", 512,
            "--out", data, "--processes", 1,
        )  # fmt: skip
    return data


def resume_exactly(part):
    """Whether a run that was stopped half-way ends with the same weights."""
    from safetensors.torch import load_file

    data, first = manual(part), part.out / "unbroken"
    steps = 4 if part.tiny else 20
    options = (
        *("--data", data, "--steps", steps, "--checkpoint-every", steps // 2),
        *("--device", part.device.type, "--dtype", "bfloat16"),
        *("--samples", 0, "--eval-rows", 4),
    )
    run_script(part, "train.py", *options, "--out", first)
    second = part.out / "resumed"
    shutil.rmtree(second, ignore_errors=True)
    shutil.copytree(first, second)
    shutil.rmtree(second / "model")
    shutil.rmtree(second / "checkpoints" / f"step_{steps:08d}")
    run_script(part, "train.py", "--out", second, "--data", data, "--resume")
    a, b = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (first, second)
    )
    worst = max((a[k].float() - b[k].float()).abs().max().item() for k in a)
    return {"equal": worst == 0.0, "largest_difference": worst}


def ranks(part):
    """What DDP costs with one rank of NCCL; save and resume, bit for bit."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    part.attempt("resume", resume_exactly, part)
    cuda = part.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
    )

    def ddp(model):
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    for name, wrap in (("alone", None), ("DDP", ddp)):
        part.attempt(
            name, training_speed, part, *sizes(part, "124m"), wrap=wrap
        )
    dist.destroy_process_group()


# Using a model


def pretrained(part):
    """(model, where it is from): a folder's, or random of SmolLM2's shape."""
    from llama_tut.tools.options import llama_shape
    from llama_tut.weights import load_pretrained

    if part.model:
        model = load_pretrained(part.model, torch.bfloat16, part.device)
        return model.eval(), part.model
    shape, V = llama_shape(64, 128, 2, 2, tie_word_embeddings=True), 512
    if not part.tiny:
        shape = llama_shape(
            576, 1536, 30, 9, num_key_value_heads=3, tie_word_embeddings=True
        )
        V = 49_152
    model = build(shape, V, 2048, part.device).bfloat16()
    return model.eval(), "random weights"


def generation_speed(part, model, B, new):
    """Tokens per second of greedy generation with a cache."""
    from llama_tut.generate import generate

    ids = torch.randint(model.config.vocab_size, (B, 32), device=part.device)
    generate(model, ids, 8)  # warm up
    synchronize(part.device)
    began = time.perf_counter()
    generate(model, ids, new)
    synchronize(part.device)
    seconds = time.perf_counter() - began
    return {"tokens_per_second": B * new / seconds, "new_tokens": new}


def reading_speed(part, model, kind, new):
    """Tokens per second, one row, one after another; and the ids, to compare.

    Args:
        kind: "plain", "fast" or "recorded", and "compiled" with it or not.
    """
    from llama_tut.fast.generation import (
        FastModel,
        FastReader,
        RecordedReader,
    )
    from llama_tut.generate import Reader

    if kind != "plain":
        compiled = "compiled" in kind
        model = FastModel(model, compiled=compiled)
    make = FastReader if "fast" in kind else RecordedReader
    reader = (Reader if kind == "plain" else make)(model, 64 + new)
    ids = list(range(32))
    reader.read(ids[:-1], 1)

    def write():
        """The same tokens each time: the second time no length is new."""
        del ids[32:]
        reader.truncate(31)
        for _ in range(new):
            logits = reader.read(ids[-1:], 1)
            ids.append(logits.argmax().item())

    write()  # warm up
    synchronize(part.device)
    began = time.perf_counter()
    write()
    seconds = time.perf_counter() - began
    return {"tokens_per_second": new / seconds, "ids": ids[32:]}


def their_reading_speed(part, model, new):
    """The same by transformers' `generate` with its default cache."""
    peer = Peer(model, part.device).inner.to(model.output_weight.dtype)
    peer.config.use_cache = True
    ids = torch.arange(32, device=part.device)[None]
    options = {
        "do_sample": False,
        "max_new_tokens": new,
        "min_new_tokens": new,
    }
    peer.generate(ids, **options)  # warm up
    synchronize(part.device)
    began = time.perf_counter()
    found = peer.generate(ids, **options)
    synchronize(part.device)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": new / seconds,
        "ids": found[0, 32:].tolist(),
    }


def scoring_speed(part, model, score, count):
    """Examples per second: contexts of 80 tokens, endings of 25."""
    generator = torch.Generator().manual_seed(0)
    V = model.config.vocab_size

    def row(n):
        return torch.randint(V, (n,), generator=generator).tolist()

    items = [(row(80), [row(25) for _ in range(4)]) for _ in range(count)]
    seconds = median_seconds(lambda: score(model, items), part.device, 3, 1)
    return {"examples_per_second": count / seconds, "examples_at_once": count}


def hellaswag_accuracy(part, model):
    """Accuracy on the book's own examples, with real weights only."""
    from transformers import AutoTokenizer

    from llama_tut.hellaswag import accuracy, read_examples
    from llama_tut.hellaswag import score as score_examples

    tokenizer = AutoTokenizer.from_pretrained(part.model)
    examples = read_examples()
    predictions = list(score_examples(model, tokenizer, examples))
    return {"accuracy": accuracy(predictions), "examples": len(examples)}


def generation(part):
    """Tokens per second by batch; HellaSwag by rows and packed."""
    from llama_tut.fast.scoring import score_packed
    from llama_tut.hellaswag import score_rows

    model, source = pretrained(part)
    part.record("weights", source)
    new = 8 if part.tiny else 64
    part.attempt("transformers", their_reading_speed, part, model, new)
    kinds = ["plain", "fast", "recorded", "recorded, compiled"]
    for kind in kinds[: 2 if part.tiny else None]:  # a CPU records nothing
        least = 60 if "compiled" in kind else 0
        part.attempt(kind, reading_speed, part, model, kind, new, least=least)
    for B in (2,) if part.tiny else (8, 64):
        part.attempt(
            f"generate {B} rows", generation_speed, part, model, B, new
        )
    count = 2 if part.tiny else 32
    for name, score in (("rows", score_rows), ("packed", score_packed)):
        part.attempt(f"score {name}", scoring_speed, part, model, score, count)
    if part.model:
        part.attempt("hellaswag", hellaswag_accuracy, part, model)


# A real run

# D, L and steps of small runs, which say what the large one should reach.
SMALL = [(96, 3, 75), (128, 4, 150), (192, 4, 300), (256, 5, 600)]
LARGE = 512, 8  # its steps follow from the time that is left


def row_sizes(part):
    """Tokens of a row, T, and rows of a step, B."""
    return (64, 4) if part.tiny else (512, 64)


def shape_options(D, L):
    """Options of a model of L layers whose heads have 64 numbers or fewer."""
    return {
        "hidden_size": D,
        "intermediate_size": 64 * math.ceil(8 * D / 3 / 64),
        "num_hidden_layers": L,
        "num_attention_heads": max(D // 64, 2),
    }


def options_of(part, data, name, D, L, steps):
    """Options of a run of `steps` steps, in a folder of its own."""
    folder, (T, B) = part.out / name, row_sizes(part)
    shutil.rmtree(folder, ignore_errors=True)
    return shape_options(D, L) | {
        "data": str(data), "out": str(folder), "steps": steps, "samples": 0,
        "sequence_length": T, "micro_batch_size": B, "tokens_per_step": T * B,
        "learning_rate": 0.5 / D, "dtype": "bfloat16",
        "device": part.device.type, "checkpoint_every": 0,
        "eval_every": 1000, "eval_rows": 1024,
    }  # fmt: skip


def flops_of(part, D, L, V, steps):
    """FLOPs of a run, as chapter 8 counts them."""
    from llama_tut.config import LlamaConfig
    from llama_tut.model import flops_per_token

    T, B = row_sizes(part)
    config = LlamaConfig(vocab_size=V, **shape_options(D, L))
    return flops_per_token(config, T) * steps * T * B


def small_runs(part, data, V):
    """The losses that a prediction is made from."""
    from llama_tut.pretraining import train
    from llama_tut.tools.options import configure

    found = []
    for D, L, steps in [(64, 2, 4), (96, 2, 8)] if part.tiny else SMALL:
        options = options_of(part, data, "small", D, L, steps)
        loss = train(configure(options))["val_loss"]
        row = {"hidden_size": D, "layers": L, "steps": steps, "val_loss": loss}
        found.append(row | {"flops": flops_of(part, D, L, V, steps)})
        part.record("small runs", found)
    return found


def run(part):
    """With the time that is left: a corpus, a prediction, a run, samples."""
    from llama_tut.scaling import fit_power, power
    from llama_tut.tools.dataset import load_dataset_info

    began = time.monotonic()
    own = part.tiny and not part.data
    data = manual(part) if own else corpus(part)
    part.record("seconds to prepare", time.monotonic() - began)
    V, (D, L) = load_dataset_info(data).vocab_size, LARGE
    if part.tiny:
        D, L = 64, 3
    small, (T, B) = small_runs(part, data, V), row_sizes(part)
    shape = shape_options(D, L) | {"tie_word_embeddings": True}
    speed = training_speed(part, shape, V, T, B, compiled="parts")
    # Starting, compiling, validations and samples take the rest.
    seconds = 0.75 * (part.left() - 40)
    steps = 8 if part.tiny else int(seconds / speed["seconds_of_a_step"])
    flops = flops_of(part, D, L, V, steps)
    table = torch.tensor([[r["flops"], r["val_loss"]] for r in small]).double()
    law = fit_power(*table.T)
    predicted = {"val_loss": power(law, flops).item(), "flops": flops}
    predicted |= {"law": [float(x) for x in law], "tokens": steps * T * B}
    for key in ("tokens_per_second", "planned_bytes", "peak_bytes"):
        predicted[key] = speed[key]
    part.record("predicted", predicted)
    options = options_of(part, data, "run", D, L, steps) | {"samples": 3}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    words += ["--compile"] * (not part.tiny)
    began = time.monotonic()
    run_script(part, "train.py", *words)
    part.record("seconds", time.monotonic() - began)
    for name, value in curve(part.out / "run").items():
        part.record(name, value)


def curve(folder):
    """What a run has written, whether or not it has come to its end."""
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        return {}
    step = max(len(lines) // 200, 1)
    means = [
        [
            lines[i]["step"],
            statistics.mean(x["loss"] for x in lines[i : i + step]),
        ]
        for i in range(0, len(lines), step)
    ]
    seen = [[x["step"], x["val_loss"]] for x in lines if "val_loss" in x]
    found = {"last line": lines[-1], "losses": means, "validations": seen}
    speeds = [x["tokens_per_second"] for x in lines]
    found["tokens_per_second"] = statistics.median(speeds)
    found["config"] = read_json(folder / "config.json")
    if (folder / "samples.txt").exists():
        found["samples"] = (folder / "samples.txt").read_text()
    return found


def source_code(part):
    """A file with the Python code that is installed here, a line a file."""
    from llama_tut.tools.docs_corpus import python_files

    roots = {Path(os.__file__).parent, Path(torch.__file__).parent.parent}
    texts = {}
    for root in sorted(roots):
        for name, path in python_files(root, root.name):
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            if 200 < len(text) < 2**19:
                texts.setdefault(text, name)
    part.record("files", len(texts))
    part.record("characters", sum(map(len, texts)))
    path = part.out / "source_code.jsonl"
    write_jsonl(path, ({"text": text} for text in texts))
    return path


def corpus(part):
    """The data folder of the run: the user's, or the code installed here."""
    if part.data:
        return Path(part.data).absolute()
    data = part.out / "source_code"
    if not (data / "dataset.json").exists():
        kind = ("--vocab-size", 8192)
        if part.tokenizer:
            kind = ("--tokenizer", Path(part.tokenizer).absolute())
        text = source_code(part)
        run_script(
            part, "prepare.py", "--corpus", text, *kind, "--out", data,
            "--val-share", 0.01,
        )  # fmt: skip
    return data


# Parts in the order of their value, each with its seconds at most
PARTS = {
    "ceilings": (ceilings, 40),
    "tests": (tests, 60),
    "training": (training, 230),
    "shapes": (shapes, 160),
    "head_loss": (head_loss, 50),
    "profiles": (profiles, 80),
    "ranks": (ranks, 70),
    "generation": (generation, 110),
    "run": (run, 240),
}
TOTAL = 515  # seconds; nine minutes with what starting and stopping take


def end(process):
    """End a part and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(3)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_part(name, seconds, args):
    """Run one part in a process of its own; note how it ended."""
    if name == "run":
        shutil.rmtree(args.out / "run", ignore_errors=True)
    path, log = args.out / f"gpu_{name}.json", args.out / f"{name}.log"
    if not args.rows:
        path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--out", args.out]
    command += ["--seconds", seconds] + ["--tiny"] * args.tiny
    for option in ("model", "data", "tokenizer"):
        if value := getattr(args, option):
            command += [f"--{option}", value]
    if args.rows:
        command += ["--rows", *args.rows]
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": PATH},
        )
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            end(process)
    numbers = {"machine": describe(), "tiny": args.tiny, "results": {}}
    if path.exists():
        numbers = read_json(path)
    began_to_train = (args.out / "run" / "metrics.jsonl").exists()
    if name == "run" and status != "done" and began_to_train:
        numbers["results"] |= curve(args.out / "run")
    numbers["machine"]["arguments"] = sys.argv[1:]
    numbers |= {"part": name, "status": status}
    numbers["seconds"] = round(time.monotonic() - began, 1)
    lines = log.read_text(errors="replace").strip().splitlines()
    if status == "failed":
        numbers["error"] = lines[-1] if lines else ""
    write_json(path, numbers)
    print(f"{name}: {status} after {numbers['seconds']} s", flush=True)


def check(args):
    """Find bad input before anything is measured or overwritten."""
    require(args.seconds > 0, f"--seconds {args.seconds}: give more than 0")
    files = {"data": "dataset.json", "tokenizer": "tokenizer.json"}
    for option, file in files.items():
        folder = getattr(args, option)
        require(
            not folder or (Path(folder) / file).is_file(),
            f"--{option} {folder}: there is no {file} in it",
        )
    for path in (args.out / f"gpu_{name}.json" for name in args.only):
        if args.rows and path.exists():
            read_json(path)  # raises InputError where it cannot be read


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="output folder")
    add("--tiny", action="store_true", help="every part, on a CPU")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add(
        "--rows", nargs="+", help="only these rows of a part; the rest is kept"
    )
    add("--model", help="folder with SmolLM2; without it, random weights")
    add("--data", help="folder of scripts/prepare.py, for the real run")
    add("--tokenizer", help="folder with one, for the code that it trains on")
    add("--seconds", type=float, default=TOTAL, help="of all parts together")
    add("--part", choices=PARTS, help="run one part in this process")
    args = parser.parse_args()
    check(args)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return PARTS[args.part][0](Part(args.part, args))
    ends = time.monotonic() + args.seconds
    for name in args.only:
        left = ends - time.monotonic()
        if left < 5:
            print(f"{name}: no time is left", flush=True)
            break
        run_part(name, min(PARTS[name][1], left), args)


if __name__ == "__main__":
    cli.run(main)
