"""Ranks on real processes: 1, 2 and 4 ranks, and ranks that are lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_tut.distributed import (
    inner,
    micro_step_sync,
    parameter_hash,
    warm_up_ddp_buckets,
    wrap,
)
from llama_tut.tools.ranks import start, stop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix"),
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--local-addr=127.0.0.1"]

TRAIN = """
import json, os, sys, time
import torch
from torch.nn import functional as F
from llama_tut.config import LlamaConfig
from llama_tut.tools.files import InputError
from llama_tut.distributed import (
    inner,
    micro_step_sync,
    parameter_hash,
    warm_up_ddp_buckets,
    wrap,
)
from llama_tut.tools.ranks import (
    broadcast_object,
    mean_over_ranks,
    shared_errors,
    start,
    stop,
    wait_for_all,
)
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer

late = float(os.environ.get("LATE", 0))
if os.environ.get("RANK") == "1":
    time.sleep(late)  # a slow import; longer than the timeout
ranks = start("cpu", timeout_s=2 if late else 20)
torch.manual_seed(ranks.rank)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=88, num_hidden_layers=2,
    num_attention_heads=2, tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)
model.init_weights()
model = wrap(model, ranks)
optimizer = build_optimizer(inner(model), learning_rate=1e-3)
W, B = ranks.world_size, 8
micro_steps = int(sys.argv[2])
share = B // W // micro_steps
zeros = torch.zeros(share, 16, dtype=torch.long)
warm_up_ddp_buckets(model, zeros, zeros)
losses, hashes, first = [], [], None
for step in range(4):
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(64, (B, 17), generator=generator)
    total = 0
    for k in range(micro_steps):
        part = rows[(k * W + ranks.rank) * share:][:share]
        with micro_step_sync(model, last=k == micro_steps - 1):
            loss = model(part[:, :-1], targets=part[:, 1:]) / micro_steps
            loss.backward()
        total = total + loss.detach()
    grads = [p.grad.flatten() for p in model.parameters()]
    first = torch.cat(grads).clone() if first is None else first
    optimizer.step()
    optimizer.zero_grad()
    losses.append(mean_over_ranks(total).item())
    hashes.append(parameter_hash(model))
heard = None
try:
    with shared_errors(ranks.gloo_group):
        if ranks.rank == W - 1:
            raise InputError("bad line 7")
except InputError as error:
    heard = str(error)
result = {
    "losses": losses, "hashes": hashes, "heard": heard,
    "gradient": first.tolist(),
    "object": broadcast_object({"rank": ranks.rank}),
}
wait_for_all(ranks)
stop()
with open(f"{sys.argv[1]}/{ranks.rank}.json", "w") as file:
    json.dump(result, file)
"""

# Ranks that average for ever, and show that they are alive.
LOOP = """
import os, sys, time, torch
from llama_tut.tools.ranks import mean_over_ranks, start
ranks = start("cpu", timeout_s=int(sys.argv[2]))
beat = open(f"{sys.argv[1]}/beat{ranks.rank}", "ab", buffering=0)
with open(f"{sys.argv[1]}/pid{ranks.rank}.part", "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, file.name.removesuffix(".part"))
while True:
    mean_over_ranks(torch.ones(1000))
    beat.write(b".")
    time.sleep(0.05)
"""


def launch(folder, script, count, *arguments, **environment):
    """Start `script` on `count` ranks, one alone without torchrun."""
    path = Path(folder, "script.py")
    path.write_text(script)
    torchrun = [*TORCHRUN, f"--nproc-per-node={count}"] if count > 1 else []
    command = [*(torchrun or [sys.executable]), path, folder]
    return subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, seconds):
    """Wait for `condition()`; whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def start_loop(folder, timeout_s=20):
    """Two ranks in LOOP: the torchrun process and the ranks' process ids."""
    job = launch(folder, LOOP, 2, timeout_s)
    beats = [folder / f"beat{rank}" for rank in range(2)]
    alive = wait_until(
        lambda: all(b.exists() and b.stat().st_size > 3 for b in beats), 60
    )
    assert alive, job.kill()
    return job, [int((folder / f"pid{r}").read_text()) for r in range(2)]


def beats(folder):
    return [(folder / f"beat{rank}").stat().st_size for rank in range(2)]


@pytest.fixture(scope="module", autouse=True)
def stopped_job(tmp_path_factory):
    """A job one of whose ranks hangs, running beside the other tests."""
    folder = tmp_path_factory.mktemp("stopped")
    job, pids = start_loop(folder, timeout_s=5)
    os.kill(pids[1], signal.SIGSTOP)
    began, seconds = time.monotonic(), []

    def watch():
        job.errors = job.communicate()[1]
        seconds.append(time.monotonic() - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield job, seconds, watcher
    if job.poll() is None:
        job.kill()


def results(tmp_path, count, micro_steps, **environment):
    """What each rank of TRAIN wrote."""
    job = launch(tmp_path, TRAIN, count, micro_steps, **environment)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    return [
        json.loads((tmp_path / f"{rank}.json").read_text())
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results(tmp_path_factory.mktemp("one"), 1, 1)[0]


@pytest.mark.parametrize("count, micro_steps", [(2, 2), (4, 1)])
def test_ranks_equal_one_process(tmp_path, one, count, micro_steps):
    late = {"LATE": "4"} if count == 2 else {}
    many = results(tmp_path, count, micro_steps, **late)
    for result in many:
        assert result["hashes"] == many[0]["hashes"]
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-5)
        torch.testing.assert_close(
            torch.tensor(result["gradient"]),
            torch.tensor(one["gradient"]),
            rtol=1e-4,
            atol=1e-7,
        )
        assert result["heard"] == "bad line 7"
        assert result["object"] == {"rank": 0}
    assert len(set(many[0]["hashes"])) == 4
    assert one["heard"] == "bad line 7"


# Seven batches for two ranks: four and three.
UNEQUAL = """
import sys, torch
from llama_tut.tools.ranks import mean_over_ranks, start, wait_for_all
ranks, steps = start("cpu", timeout_s=2), 0
try:
    for _ in range(ranks.rank, 7, 2):
        mean_over_ranks(torch.ones(1000))
        steps += 1
    wait_for_all(ranks)
except RuntimeError as error:
    assert "Timed out" in str(error) or ranks.rank == 1, error
    print("rank", ranks.rank, "ends after", steps, flush=True)
"""


def test_a_rank_without_a_batch_ends_the_job(tmp_path):
    """It would hang; the timeout ends the other rank in its fourth step."""
    job = launch(tmp_path, UNEQUAL, 2)
    out, _ = job.communicate(timeout=120)
    assert "rank 0 ends after 3" in out


def test_a_killed_rank_ends_the_job(tmp_path):
    job, pids = start_loop(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - began < 60
    before = beats(tmp_path)
    time.sleep(0.5)
    assert beats(tmp_path) == before


def test_ranks_end_with_a_killed_torchrun(tmp_path):
    job, pids = start_loop(tmp_path)
    assert all(os.getsid(pid) != os.getsid(job.pid) for pid in pids)
    job.kill()
    job.wait()
    time.sleep(2.5)  # the thread looks once a second
    before = beats(tmp_path)
    time.sleep(1)
    assert beats(tmp_path) == before


def test_alone():
    ranks = start("cpu")
    assert (ranks.rank, ranks.world_size) == (0, 1)
    model = torch.nn.Linear(2, 2)
    assert wrap(model, ranks) is model and inner(model) is model
    with micro_step_sync(model, last=False):
        model(torch.ones(1, 2)).sum().backward()
    warm_up_ddp_buckets(model, None, None)
    stop()


def test_gradients_are_held_back_until_the_last():
    held = []

    class Ddp(torch.nn.Linear):  # DDP has this context, and asks in forward
        @contextmanager
        def no_sync(self):
            held.append(True)
            yield

    model, sent = Ddp(2, 2), []
    for micro in range(4):
        held.clear()
        with micro_step_sync(model, last=micro == 3):
            sent.append(not held)
    assert sent == [False, False, False, True]


def test_hash_sees_the_sign_of_zero_and_ignores_wrappers():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    before = parameter_hash(model)
    compiled = torch.compile(model)
    assert parameter_hash(compiled) == before
    assert parameter_hash(SimpleNamespace(module=compiled)) == before
    with torch.no_grad():
        model.weight.neg_()
    assert parameter_hash(model) != before


def test_zz_a_hanging_rank_ends_the_job(stopped_job):
    """Last: it takes the timeout and torchrun's 30 seconds of grace."""
    job, seconds, watcher = stopped_job
    watcher.join(60)
    assert seconds and seconds[0] < 60
    assert job.returncode != 0 and "Timed out" in job.errors
