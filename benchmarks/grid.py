"""Many short runs of the trainer: two at a time, one thread each, resumable.

A grid is a list of `Job`s. Each has a folder of its own, named by its options,
so that a changed option is a new run; a finished run is not made again.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama_tut.fast.training import speed_up
from llama_tut.pretraining import build_llama, train
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError, write_json
from llama_tut.tools.options import configure
from llama_tut.tools.runs import read_metrics


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    name: str
    options: dict  # of `configure`, without data and out
    build: Callable = build_llama
    about: dict = field(default_factory=dict)  # of `build`; for the record

    def folder(self, root):
        """Where this run lives: the name, and a hash of what it depends on."""
        text = json.dumps([self.options, self.about], sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return Path(root) / f"{self.name}-{digest}"


def curves(lines):
    """(validations, training): the loss over tokens of a metrics.jsonl.

    A validation is [tokens, nats] or [tokens, nats, choice accuracy]; a
    training loss is the mean since the last validation, [tokens, nats].
    """
    validations, training, since = [], [], []
    for line in lines:
        since.append(line["loss"])
        if "val_loss" in line:
            point = [line["tokens"], round(line["val_loss"], 5)]
            if "choice" in line:
                point.append(round(line["choice"], 4))
            validations.append(point)
            mean = sum(since) / len(since)
            training.append([line["tokens"], round(mean, 4)])
            since = []
    return validations, training


def sizes(model, T):
    """Parameters and FLOPs per token of any model of this book, counted.

    A matrix that multiplies takes 2 FLOPs per weight, scores and averages of
    attention 4LTHC; the backward pass takes twice as much.
    """
    counts = {n: p.numel() for n, p in model.named_parameters()}
    tables = sum(
        n for k, n in counts.items() if "embed" in k or "lm_head" in k
    )
    inner = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    )
    c = model.config
    head = c.vocab_size * c.hidden_size
    read = 4 * c.num_hidden_layers * T * c.num_attention_heads * c.head_dim
    return {
        "parameters": sum(counts.values()),
        "non_embedding": sum(counts.values()) - tables,
        "flops_per_token": 3 * (2 * (inner + head) + read),
    }


def record_of(job, out, seconds):
    """What the result file keeps of a finished run."""
    about = json.loads((out / "config.json").read_text())["config"]
    config = configure({**job.options, "data": about["data"]})
    with torch.device("meta"):
        model = job.build(config, load_dataset_info(about["data"]))
    size = sizes(model, config.sequence_length)
    lines = read_metrics(out / "metrics.jsonl")
    validations, training = curves(lines)
    tokens = lines[-1]["tokens"]
    return {
        "name": job.name,
        **job.about,
        "options": job.options,
        **size,
        "tokens": tokens,
        "flops": tokens * size["flops_per_token"],
        "val_loss": lines[-1]["val_loss"],
        "bits_per_byte": lines[-1]["bits_per_byte"],
        # The time of the steps themselves: no start, no validation.
        "seconds": round(
            sum(
                job.options["tokens_per_step"] / line["tokens_per_second"]
                for line in lines
            ),
            1,
        ),
        "wall_seconds": round(seconds, 1),
        "curve": validations,
        "train": training,
    }


def check_data(out, data):
    """Refuse a run that was made of another text. Raises: InputError."""
    path = out / "config.json"
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())["data"]["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not readable ({error}); remove {out}"
        ) from error
    if before != load_dataset_info(data).hash:
        raise InputError(
            f"{out} is a run on other text than {data}: choose another --runs"
        )


# In a worker whose run was stopped: it has taken further jobs off the queue
# already, and must not begin them.
STOPPED = threading.Event()


def run_job(job, root, data, threads=1):
    """Make one run, or find it made; its record, or None if it was stopped."""
    if STOPPED.is_set():
        return None
    torch.set_num_threads(threads)
    out = job.folder(root)
    path = out / "record.json"
    check_data(out, data)
    if path.exists():
        try:
            return json.loads(path.read_text())
        except ValueError:
            pass  # damaged: made again from the run's own files
    out.parent.mkdir(parents=True, exist_ok=True)
    config = configure(
        {**job.options, "data": str(data), "out": str(out), "resume": True}
    )
    began = time.perf_counter()
    # Beside the folder: a run refuses one that holds something else.
    log = out.with_name(out.name + ".log")
    with open(log, "a") as file, contextlib.redirect_stdout(file):
        last = train(config, job.build, prepare_model=speed_up)
    if last is None or last["step"] < config.steps:
        STOPPED.set()
        return None
    record = record_of(job, out, time.perf_counter() - began)
    write_json(path, record)
    return record


def end_workers(number, frame):
    """For SIGTERM: `kill` reaches only us, while Ctrl-C reaches the workers."""
    for worker in multiprocessing.active_children():
        worker.terminate()  # it saves its run, and ends
    raise KeyboardInterrupt


def run_grid(root, data, jobs, workers=2, threads=1):
    """Make all runs that are missing -> records, in the order of `jobs`.

    Raises: SystemExit(130) when stopped; the same call goes on. InputError
        for what the options or the data get wrong.
    """
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names), "two jobs of one name"
    # Read by the children when they start.
    os.environ.update(OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1")
    context = multiprocessing.get_context("spawn")
    found, began = {}, time.perf_counter()
    before = signal.signal(signal.SIGTERM, end_workers)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {
            pool.submit(run_job, job, root, data, threads): job for job in jobs
        }
        try:
            for future in as_completed(waiting):
                job, record = waiting[future], future.result()
                if record is None:
                    raise KeyboardInterrupt
                found[job.name] = record
                print(
                    f"{len(found):3}/{len(jobs)} {job.name:28} "
                    f"{record['val_loss']:.4f} nats, "
                    f"{record['wall_seconds']:4.0f} s, "
                    f"{(time.perf_counter() - began) / 60:.1f} min in all",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("stopped: the same command goes on")
            raise SystemExit(130) from None
        finally:
            signal.signal(signal.SIGTERM, before)
    return [found[name] for name in names]
