"""The trainer on every layout: the same losses, and checkpoints that move.

Two jobs of real ranks, of two and of four, do all that needs ranks; each makes
several runs after another. The tests look at what they left.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training_setup import (
    OPTIONS,
    finish,
    kill_when,
    losses,
    metrics,
    start,
)

from llama_tut.checkpoint import latest_checkpoint, verify_checkpoint
from llama_tut.parallel import ParallelLayout
from llama_tut.pretraining import train
from llama_tut.tools.files import InputError
from llama_tut.tools.on_ranks import on_ranks
from llama_tut.tools.options import configure, extra_options
from llama_tut.tools.parallel_config import ParallelOptions, check_layout
from llama_tut.tools.ranks import Ranks
from llama_tut.weights import load_pretrained

pytestmark = pytest.mark.slow

COMMON = OPTIONS | {"steps": 8, "checkpoint_every": 4, "keep_checkpoints": 9}


def make_runs():
    """On every rank: make the runs of $JOB; what was refused, by name."""
    import json
    import os
    import shutil
    from pathlib import Path

    import torch

    from llama_tut import pretraining
    from llama_tut.model import LlamaForCausalLM
    from llama_tut.parallel import ParallelLayout
    from llama_tut.tools.files import InputError
    from llama_tut.tools.options import configure, llama_config
    from llama_tut.tools.parallel_config import ParallelOptions
    from llama_tut.tools.ranks import start, stop, wait_for_all

    folder, common, runs = json.loads(os.environ["JOB"])
    out, ranks = Path(folder), start("cpu")
    pretraining.start = lambda device: ranks  # one group for all runs
    pretraining.stop = lambda: None

    class Crash(Exception):
        pass

    def crashing(config, info):
        class Model(LlamaForCausalLM):
            passes = 0

            def forward(self, *args, **kwargs):
                self.passes += self.training and torch.is_grad_enabled()
                if self.passes == 22:
                    raise Crash
                return super().forward(*args, **kwargs)

        return Model(llama_config(config, info))

    said = {}
    for name, changes in runs.items():
        came_from, crash = changes.pop("from", None), changes.pop("crash", 0)
        if came_from and ranks.rank == 0:  # resume at step 4 another's run
            shutil.copytree(out / came_from, out / name)
            shutil.rmtree(out / name / "checkpoints" / "step_00000008")
        wait_for_all(ranks)
        options = common | {"out": str(out / name.split("+")[0])} | changes
        config = configure(options, [ParallelOptions])
        build = crashing if crash else pretraining.build_llama
        try:
            pretraining.train(config, build, build_layout=ParallelLayout)
        except (InputError, Crash) as error:
            said[name] = str(error)
    stop()
    return said


def run_job(ranks, out, runs, data):
    """Make runs {name: options} on real ranks; what was refused, by name."""
    common = COMMON | {"data": str(data)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOB", json.dumps([str(out), common, runs]))
        return on_ranks(ranks, make_runs)[0]


@pytest.fixture(scope="module")
def jobs(data, stories, tmp_path_factory):
    """The folder of all runs, and what the jobs refused."""
    out = tmp_path_factory.mktemp("layouts")
    alone(data, out / "one")
    fsdp = {"parallel": "fsdp", "recompute": True}
    both = {"parallel": "fsdp", "tensor_parallel": 2}
    pair = {
        "fsdp": fsdp,
        "tp": {"tensor_parallel": 2},
        "killed": fsdp | {"crash": True},
        "killed+resumed": fsdp | {"resume": True},
        "measured": fsdp
        | dict(data=str(stories), sequence_length=128, steps=1)
        | dict(hellaswag="own", hellaswag_limit=3, choice=6),
        "heads": {"tensor_parallel": 2, "num_attention_heads": 1},
        "kv": {"tensor_parallel": 2, "num_key_value_heads": 1},
        "width": {"tensor_parallel": 2, "intermediate_size": 49},
    }
    said = run_job(2, out, pair, data)
    four = {
        "both": both,
        "ddp": {},
        "odd": both | {"vocab_size": 283, "tie_word_embeddings": False},
        "fsdp on 4": {"parallel": "fsdp", "from": "fsdp", "resume": True},
        "fsdp on 2 x 2": both | {"from": "fsdp", "resume": True},
        "tp on ddp": {
            "from": "tp", "resume": True, "tensor_parallel": 1,
            "micro_batch_size": 4,
        },
    }  # fmt: skip
    assert run_job(4, out, four, data) == {}
    return out, said


def alone(data, out, **changes):
    """A run of this process."""
    options = COMMON | {"data": str(data), "out": str(out)} | changes
    config = configure(options, [ParallelOptions])
    return train(config, build_layout=ParallelLayout)


def columns(folder, *names):
    """Numbers of a run, step by step."""
    return [[line[name] for name in names] for line in metrics(folder)]


@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp", "tp", "both", "fsdp on 4", "fsdp on 2 x 2", "tp on ddp"],
)
def test_every_layout_has_the_losses_of_one_process(jobs, name):
    out, _ = jobs
    want, found = (
        [*columns(out / n, "loss", "grad_norm")] for n in ("one", name)
    )
    assert len(found) == 8
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(want), rtol=1e-5, atol=1e-5
    )
    last = [metrics(out / n)[-1] for n in ("one", name)]
    for key in ("val_loss", "bits_per_byte"):
        assert last[0][key] == pytest.approx(last[1][key], abs=1e-5)
    assert last[0]["tokens"] == last[1]["tokens"] == 8 * 512


@pytest.mark.parametrize("name", ["fsdp", "tp", "both"])
def test_every_layout_exports_the_whole_model(jobs, name):
    out, _ = jobs
    load_pretrained(out / name / "model")
    want, found = (
        load_file(out / n / "model" / "model.safetensors")
        for n in ("one", name)
    )
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert "sample 1" in (out / name / "samples.txt").read_text()


def test_each_rank_writes_its_own_pieces(jobs):
    out, _ = jobs
    path = latest_checkpoint(out / "fsdp" / "checkpoints")
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 2
    sizes = [file.stat().st_size for file in files]
    N = sum(
        t.numel()
        for t in load_file(
            out / "one" / "model" / "model.safetensors"
        ).values()
    )
    random_states = 2 * 5056
    assert 12 * N < sum(sizes) - random_states < 12 * N + 40_000
    assert max(sizes) < 0.6 * sum(sizes)
    file = bytearray(files[1].read_bytes())
    file[-1] ^= 1
    files[1].write_bytes(file)
    assert verify_checkpoint(path) == (
        f"{files[1].name} has changed since it was written"
    )
    file[-1] ^= 1
    files[1].write_bytes(file)
    assert verify_checkpoint(path) is None


def test_killed_and_resumed_bit_for_bit_on_the_same_layout(jobs):
    out, said = jobs
    assert said["killed"] == ""  # the crash
    assert losses(out / "killed") == losses(out / "fsdp")
    files = [
        out / n / "model" / "model.safetensors" for n in ("fsdp", "killed")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "both", "odd"])
def test_what_many_wrote_one_process_resumes(data, jobs, tmp_path, name):
    out, _ = jobs
    run = tmp_path / "run"
    shutil.copytree(out / name, run)
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    config = configure(
        {"out": str(run), "resume": True, "parallel": "ddp",
         "tensor_parallel": 1}, [ParallelOptions]
    )  # fmt: skip
    train(config, build_layout=ParallelLayout)
    want, found = (columns(n, "loss", "grad_norm") for n in (out / name, run))
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(want), rtol=1e-5, atol=1e-5
    )


def test_measuring_takes_all_ranks(jobs):
    out, _ = jobs
    last = metrics(out / "measured")[-1]
    assert {"hellaswag", "choice", "val_loss"} <= last.keys()


def test_what_cannot_be_divided_is_refused_by_name(jobs):
    _, said = jobs
    assert said.keys() == {"killed", "heads", "kv", "width"}
    for name, words in (
        ("heads", "head"), ("kv", "kv heads"), ("width", "intermediate_size"),
    ):  # fmt: skip
        assert words in said[name] and "\n" not in said[name], said[name]


@pytest.mark.parametrize(
    "changes, world_size, words",
    [
        ({"tensor_parallel": 3}, 4, "--tensor-parallel 3 does not divide"),
        ({"tensor_parallel": 2}, 1, "--tensor-parallel 2 does not divide"),
        ({"tensor_parallel": 2}, 4, "say --parallel fsdp as well"),
        ({"tensor_parallel": 0}, 4, "--tensor-parallel 0 must be at least 1"),
        ({"parallel": "zero"}, 4, "take ddp or fsdp"),
        ({"parallel": "fsdp", "optimizer": "muon"}, 4, "--optimizer muon"),
        ({"tensor_parallel": 4, "optimizer": "muon"}, 4, "--optimizer muon"),
    ],
)
def test_a_layout_that_cannot_be(data, tmp_path, changes, world_size, words):
    options = COMMON | {"data": str(data), "out": str(tmp_path / "run")}
    with pytest.raises(InputError, match=words) as error:
        config = configure(options | changes, [ParallelOptions])
        if changes.get("tensor_parallel") == 3 or world_size == 1:
            ParallelLayout(config, Ranks(world_size=world_size))
        options = extra_options(config, ParallelOptions)
        check_layout(options, config.optimizer, world_size)
    assert "\n" not in str(error.value)


def test_one_rank_of_fsdp_is_one_process(data, tmp_path):
    config = configure({"parallel": "fsdp"}, [ParallelOptions])
    layout = ParallelLayout(config, Ranks())
    assert layout.mesh is None and layout.readers == Ranks()
    config = replace(config, extra={"recompute": True})
    assert ParallelLayout(config, Ranks()).memory == {"recompute": True}


def test_kill_9_in_a_save_and_resume_bit_for_bit(data, jobs, tmp_path):
    out = tmp_path / "run"
    options = COMMON | {"data": data, "out": out, "steps": 8}
    # Plain, because the run of `jobs` that it is compared with swaps nothing in.
    options |= {"parallel": "fsdp", "recompute": True, "plain": True}
    process = start(options, 2)
    kill_when(process, (out / "checkpoints" / ".tmp-step_00000008").exists)
    code, said, err = finish(start({**options, "resume": True}, 2))
    assert (code, err) == (0, "")
    assert "resumed at step 4" in said or "resumed at step 8" in said
    assert losses(out) == losses(jobs[0] / "fsdp")
