"""What the tests of checkpoints and training share: a tiny corpus and a tiny model."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from llama_tut.tools.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
# 8 rows of 32 tokens per step; some 11 steps are an epoch of the tiny corpus
OPTIONS = {
    "steps": 16,
    "sequence_length": 32,
    "micro_batch_size": 2,
    "tokens_per_step": 512,
    "learning_rate": 1e-2,
    "eval_rows": 5,
    "samples": 1,
    "sample_tokens": 8,
    "checkpoint_every": 4,
    "dtype": "float32",
    "device": "cpu",
    **SHAPE,
}
# The smallest run there is: one layer, two rows of 16 tokens per step
TINY = {
    "sequence_length": 16,
    "micro_batch_size": 2,
    "tokens_per_step": 32,
    "samples": 0,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


def tiny_data(folder, seed=0):
    """A data folder of some 5,500 tokens in 280 different ones."""
    words = "the a red blue cat dog sees finds under over house tree".split()
    draw = random.Random(seed)
    text = " ".join(draw.choice(words) for _ in range(3000))
    (folder / "tiny.txt").write_text(text)
    files = [folder / "tiny.txt"]
    prepare(files, folder / "data", 1, tokenizer="bpe", vocab_size=280)
    return folder / "data"


def flags(options):
    """The options as a command line."""
    line = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", str(value)]
    return line


def metrics(folder):
    """The lines of a run's metrics.jsonl."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(folder):
    """{step: loss} of a run."""
    return {line["step"]: line["loss"] for line in metrics(folder)}


def start(options, ranks=None, script="train_ddp.sh", **environment):
    """Start scripts/train.py, or train_ddp.sh with so many ranks."""
    command = ["bash", str(ROOT / "scripts" / script)]
    if ranks is None:
        command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    environment = {"OMP_NUM_THREADS": "1", "NPROC": str(ranks), **environment}
    return subprocess.Popen(
        [*command, *flags(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process, timeout=120):
    """Wait for a process: (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for_step(process, out, step):
    """Wait until a run has written the line of a step."""
    path = out / "metrics.jsonl"
    for _ in range(2000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.03)
    raise AssertionError(f"no step {step} within a minute")


def kill_at(process, out, step):
    """kill -9 torchrun at a step; its workers must follow within seconds."""
    wait_for_step(process, out, step)
    kill_when(process, lambda: True)


def kill_when(process, moment):
    """kill -9 torchrun as soon as `moment()`; its workers must follow."""
    workers = psutil.Process(process.pid).children(recursive=True)
    for _ in range(60_000):
        if moment():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    workers += psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(set(workers), timeout=20)
    assert not alive
