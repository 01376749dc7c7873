"""The plan of memory."""

from types import SimpleNamespace

import pytest
import torch

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer
from llama_tut.pretraining import build_llama
from llama_tut.tools import memory
from llama_tut.tools.files import InputError
from llama_tut.tools.options import (
    configure,
)


def on_meta(name, vocab_size=50_257):
    info = SimpleNamespace(vocab_size=vocab_size, end_of_text=0)
    with torch.device("meta"):
        return build_llama(configure({"preset": name}), info)


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("laptop", 1.05e6, 1.08e6),
        ("h100", 123e6, 125e6),
        ("8xh100-350m", 349e6, 352e6),
        ("llama3-8b", 8.03e9, 8.031e9),
    ],
)
def test_presets_have_the_size_of_their_names(name, low, high):
    V = {"laptop": 2048, "llama3-8b": 128_256}.get(name, 50_257)
    model = on_meta(name, V)
    assert low < sum(p.numel() for p in model.parameters()) < high


@pytest.mark.parametrize(
    "name, room", [("24gb", 24e9), ("h100", 80e9), ("8xh100-350m", 80e9)]
)
def test_presets_fit_the_gpu_of_their_names(name, room):
    plan = memory.plan(
        configure({"preset": name}),
        on_meta(name),
        torch.device("cuda"),
        torch.bfloat16,
    )
    assert sum(plan.values()) < 0.9 * room


def test_muon_needs_less_memory_than_planned():
    """The plan is an upper bound for either optimizer."""
    config = configure({})
    model = LlamaForCausalLM(LlamaConfig(280, 32, 48, 2, 2))
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, name)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        held = sum(
            value.numel() * 4
            for state in optimizer.state_dict()["state"].values()
            for value in state.values()
            if torch.is_tensor(value) and value.dim()
        )
        plan = memory.plan(config, model, torch.device("cpu"), torch.float32)
        assert held <= plan["optimizer"]


def test_frozen_weights_have_no_gradients():
    config = configure({})
    data = SimpleNamespace(vocab_size=2048, end_of_text=0)
    with torch.device("meta"):
        model = build_llama(config, data)
    where = torch.device("cpu"), torch.float32
    before = memory.plan(config, model, *where)
    model.model.embed_tokens.requires_grad_(False)
    after, frozen = memory.plan(config, model, *where), 2048 * 128
    assert after["parameters"] == before["parameters"]
    assert before["gradients"] - after["gradients"] == 4 * frozen
    assert before["optimizer"] - after["optimizer"] == 8 * frozen


@pytest.mark.parametrize("name", ["llama3-1b", "llama3-8b"])
def test_llama_3_fits_eight_h100(name):
    """As its preset lays it out; the 8B model does not fit on one."""
    config = configure({"preset": name})
    data = SimpleNamespace(vocab_size=128_256, end_of_text=0)
    with torch.device("meta"):
        model = build_llama(config, data)
    recompute = config.extra.get("recompute", False)
    layout = {"shards": 8, "recompute": recompute}
    where = config, model, torch.device("cuda"), torch.bfloat16
    assert config.extra["parallel"] == "fsdp"
    memory.check(memory.plan(*where, **layout), 80e9, "an H100")
    if name == "llama3-8b":
        with pytest.raises(InputError, match="--parallel fsdp on more ranks"):
            memory.check(memory.plan(*where), 80e9, "an H100")
