"""Measure everything that needs a GPU, in under nine minutes and without a network.

PYTHONPATH=. python benchmarks/gpu.py --out runs/gpu
PYTHONPATH=. python benchmarks/gpu.py --out runs/gpu_tiny --tiny    CPU, two minutes

Each part runs in a process of its own, with a time limit of its own, and
writes gpu_PART.json as it goes. So a part that fails or hangs costs its own
numbers only. Parts stand in the order of their value; copy their files to
benchmarks/results/ to have the book show them.
"""

import argparse
import gc
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from llama_tut.tools.files import (
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from llama_tut.tools.machine import describe

ROOT = Path(__file__).resolve().parent.parent

# What a part gets


class Part:
    """Where a part writes, how large it may be, and how long it may take."""

    def __init__(self, name, out, seconds, tiny, model=None, data=None):
        self.path = Path(out) / f"gpu_{name}.json"
        self.out, self.tiny = Path(out), tiny
        self.model, self.data = model, data
        self.end = time.monotonic() + seconds
        cuda = torch.cuda.is_available() and not tiny
        self.device = torch.device("cuda" if cuda else "cpu")
        self.numbers = {"machine": describe(), "tiny": tiny, "results": {}}

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
    """pytest -k cuda."""
    where = "tests/test_on_cuda.py" if part.tiny else "tests"
    command = [
        *(sys.executable, "-m", "pytest", where, "-k", "cuda"),
        *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
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


def swap(model, attention=False, loss=False):
    """Swap in blocked attention, the loss by tiles, or both."""
    from llama_tut.attention import LlamaAttention
    from llama_tut.fast.training import blocked_attention, head_loss

    for module in model.modules():
        if attention and isinstance(module, LlamaAttention):
            module.attend = blocked_attention
    if loss:
        model.compute_loss = head_loss


def training_speed(part, shape, V, T, B, compiled=False, wrap=None, **swaps):
    """Tokens per second, MFU and memory of whole steps in bfloat16.

    Args:
        shape: of the model; V: vocabulary; T: tokens per row; B: rows per step.
        compiled: whether torch.compile makes the step.
        wrap: called with the model, such as DDP.
        swaps: arguments of `swap`.
    """
    from llama_tut.optimizer import build_optimizer
    from llama_tut.tools.devices import peak_flops
    from llama_tut.tools.memory import plan
    from llama_tut.tools.options import TrainConfig

    device = part.device
    model = build(shape, V, T, device)
    swap(model, **swaps)
    optimizer = build_optimizer(model)
    callee = wrap(model) if wrap else model
    if compiled:  # in tiny mode the compiler's path, but no code by it
        backend = "aot_eager" if part.tiny else "inductor"
        callee = torch.compile(callee, backend=backend)
    ids = torch.randint(V, (B, T + 1), device=device)
    losses = []

    def step():
        with torch.autocast(device.type, torch.bfloat16):
            loss = callee(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    began = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - began
    peak = peak_bytes(step, device)
    rounds = 2 if part.tiny else 10
    seconds = median_seconds(step, device, rounds, warm_up=1)
    config = TrainConfig(
        sequence_length=T, micro_batch_size=B, tokens_per_step=B * T
    )
    found = {
        "tokens_per_second": B * T / seconds,
        "seconds_of_a_step": seconds,
        "seconds_of_the_first_step": first,
        "peak_bytes": peak,
        "planned_bytes": sum(
            plan(config, model, device, torch.bfloat16).values()
        ),
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
    "attention by blocks": {"attention": True},
    "compiled": {"compiled": True},
    "compiled, loss by tiles": {"compiled": True, "loss": True},
    "compiled, attention by blocks": {"compiled": True, "attention": True},
}


def training(part):
    """124M, T 1024: eager and compiled, each fast part by itself."""
    for name, options in LADDER.items():
        least = 20 if options.get("compiled") and not part.tiny else 0
        part.attempt(
            name,
            training_speed,
            part,
            *sizes(part, "124m"),
            least=least,
            **options,
        )


def shapes(part):
    """350M and a 1B shape, each as `speed_up` leaves it on a GPU or not."""
    for name in ("350m", "1b"):
        for how in ("plain", "loss by tiles", "compiled"):
            part.attempt(
                f"{name} {how}",
                training_speed,
                part,
                *sizes(part, name),
                least=25 if how == "compiled" and not part.tiny else 0,
                **LADDER[how],
            )


# The loss alone


def loss_speed(part, V, D, rows, words=None):
    """Milliseconds, forward and backward, and memory of the head's loss.

    Args:
        words: width of a tile; 0 for the width that is the default, None for
            plain cross entropy on all logits.
    """
    from llama_tut.fast import training as fast

    device = part.device
    hidden = torch.randn(rows, D, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(V, D, device=device)).requires_grad_()
    targets = torch.randint(V, (rows,), device=device)
    default = fast.tile_size

    def loss():
        if words is not None:
            return fast.head_loss(hidden, weight, targets)
        return F.cross_entropy((hidden @ weight.T).float(), targets)

    def work():
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        hidden.grad = weight.grad = None
        return value

    try:
        if words:
            tiles = -(-V // words)
            fast.tile_size = lambda V, device: (
                default(V, device)[0],
                -(-V // tiles),
                1,
            )
        peak = peak_bytes(work, device)
        seconds = median_seconds(work, device, 3 if part.tiny else 10, 1)
        return {
            "milliseconds": 1e3 * seconds,
            "peak_bytes": peak,
            "loss": work().item(),
        }
    finally:
        fast.tile_size = default


def head_loss(part):
    """Plain cross entropy against tiles of several widths."""
    rows = 64 if part.tiny else 16_384
    for V, D in (
        ((512, 32),) if part.tiny else ((50_304, 768), (128_256, 2048))
    ):
        widths = (None, 0, 128) if part.tiny else (None, 0, 8192, 32_768, V)
        for words in widths:
            how = {None: "plain", 0: "tiles"}.get(words, f"tiles of {words}")
            part.attempt(f"V {V} {how}", loss_speed, part, V, D, rows, words)


# One rank of many


def run_script(part, name, *args):
    """Run a script of this project; its output. Raises when it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, args)],
        cwd=part.out,
        capture_output=True,
        text=True,
        timeout=max(part.left() - 2, 1),
        env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
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
    new = 8 if part.tiny else 128
    for B in (1, 2) if part.tiny else (1, 8, 64):
        part.attempt(
            f"generate {B} rows", generation_speed, part, model, B, new
        )
    count = 2 if part.tiny else 32
    for name, score in (("rows", score_rows), ("packed", score_packed)):
        part.attempt(f"score {name}", scoring_speed, part, model, score, count)
    if part.model:
        part.attempt("hellaswag", hellaswag_accuracy, part, model)


# A real run

TOKENS = 32_768  # of a step: 100 million take some 3,000 steps


def run(part):
    """With the time that is left: prepare a corpus, train, write samples."""
    if part.tiny:
        data, steps = manual(part), 8
        options = ["--steps", steps]
    else:
        data, options = corpus(part)
    folder = part.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    run_script(
        part, "train.py", "--data", data, "--out", folder, *options,
        "--device", part.device.type, "--dtype", "bfloat16", "--samples", 3,
    )  # fmt: skip
    part.record("seconds", time.monotonic() - began)
    lines = [line for _, line in read_jsonl(folder / "metrics.jsonl")]
    part.record("last line", lines[-1])
    step = max(len(lines) // 200, 1)
    part.record("losses", [[x["step"], x["loss"]] for x in lines[::step]])
    part.record(
        "validations",
        [[x["step"], x["val_loss"]] for x in lines if "val_loss" in x],
    )
    part.record("config", read_json(folder / "config.json"))
    part.record("samples", (folder / "samples.txt").read_text())
    shutil.copy(folder / "curves.png", part.out / "gpu_run.png")


def docstrings(part):
    """A text file with the docstrings of PyTorch and of Python itself.

    The default corpus reads more packages; an image may not have them all.
    """
    from llama_tut.tools.docs_corpus import python_files, read_docstrings

    files = list(python_files(Path(torch.__file__).parent, "torch"))
    files += python_files(Path(os.__file__).parent, "python")
    texts = dict.fromkeys(text for _, text in read_docstrings(files))
    path = part.out / "docstrings.jsonl"
    write_jsonl(path, ({"text": text} for text in texts))
    return path


def corpus(part):
    """A data folder, and options of a run that fits into the time."""
    began = time.monotonic()
    data = Path(part.data or part.out / "docs").absolute()
    if not part.data:
        options = ("--vocab-size", 4096, "--out", data)
        try:
            run_script(part, "prepare.py", *options)
        except RuntimeError as error:
            part.record("without the default corpus", str(error))
            text = docstrings(part)
            run_script(part, "prepare.py", "--corpus", text, *options)
    part.record("seconds to prepare", time.monotonic() - began)
    shape = (
        *("--hidden-size", 512, "--intermediate-size", 1408),
        *("--num-hidden-layers", 8, "--num-attention-heads", 8),
        *("--sequence-length", 512, "--micro-batch-size", 64),
        *("--tokens-per-step", TOKENS, "--learning-rate", 1e-3),
    )
    probe = part.out / "probe"
    shutil.rmtree(probe, ignore_errors=True)
    run_script(
        part, "train.py", "--data", data, "--out", probe, *shape,
        "--steps", 30, "--dtype", "bfloat16", "--samples", 0,
    )  # fmt: skip
    seconds = statistics.median(
        TOKENS / line["tokens_per_second"]
        for _, line in read_jsonl(probe / "metrics.jsonl")
        if line["step"] > 10
    )
    # Starting, validation and samples take some twenty seconds of the rest.
    steps = max(int(0.8 * (part.left() - 25) / seconds), 20)
    return data, [*shape, "--steps", min(steps, 8000)]


# Parts in the order of their value, each with its seconds at most
PARTS = {
    "ceilings": (ceilings, 40),
    "tests": (tests, 60),
    "training": (training, 150),
    "shapes": (shapes, 120),
    "head_loss": (head_loss, 50),
    "ranks": (ranks, 70),
    "generation": (generation, 60),
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
    path, log = args.out / f"gpu_{name}.json", args.out / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--out", args.out]
    command += ["--seconds", seconds] + ["--tiny"] * args.tiny
    for option, value in (("--model", args.model), ("--data", args.data)):
        command += [option, value] if value else []
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
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
    numbers["machine"]["arguments"] = sys.argv[1:]
    numbers |= {"part": name, "status": status}
    numbers["seconds"] = round(time.monotonic() - began, 1)
    lines = log.read_text(errors="replace").strip().splitlines()
    if status == "failed":
        numbers["error"] = lines[-1] if lines else ""
    write_json(path, numbers)
    print(f"{name}: {status} after {numbers['seconds']} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="output folder")
    add("--tiny", action="store_true", help="every part, on a CPU")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--model", help="folder with SmolLM2; without it, random weights")
    add("--data", help="folder of scripts/prepare.py, for the real run")
    add("--seconds", type=float, default=TOTAL, help="of all parts together")
    add("--part", choices=PARTS, help="run one part in this process")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        measure = PARTS[args.part][0]
        limits = args.out, args.seconds, args.tiny
        measure(Part(args.part, *limits, args.model, args.data))
        return
    ends = time.monotonic() + args.seconds
    for name in args.only:
        left = ends - time.monotonic()
        if left < 5:
            print(f"{name}: no time is left", flush=True)
            break
        run_part(name, min(PARTS[name][1], left), args)


if __name__ == "__main__":
    main()
