"""A model compiled in parts: same values, one program for all layers, itself as before."""

import copy
from functools import partial

import pytest
import torch
from small_model import SIZES

from llama_tut.config import LlamaConfig
from llama_tut.distributed import inner
from llama_tut.fast.training import speed_up
from llama_tut.gpt2 import LadderConfig, LadderForCausalLM
from llama_tut.model import LlamaForCausalLM
from llama_tut.moe import MoEConfig, MoEForCausalLM
from llama_tut.parallel import recompute
from llama_tut.tools.compilation import InParts

CONFIG = LlamaConfig(**SIZES)


def gpt2():
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return LadderForCausalLM(LadderConfig(**sizes))


def with_experts():
    config = MoEConfig(**SIZES, mlp="mixtral", experts=4, experts_per_token=2)
    return MoEForCausalLM(config)


MODELS = {
    "llama": partial(LlamaForCausalLM, CONFIG),
    "fast": lambda: speed_up(LlamaForCausalLM(CONFIG), "cpu", torch.bfloat16),
    "recomputed": lambda: recompute(LlamaForCausalLM(CONFIG)),
    "GPT-2": gpt2,
    "experts": with_experts,
}


@pytest.fixture
def compiler():
    """(the graphs that it is given, a backend that runs them as they are)."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    torch.compiler.reset()
    return seen, backend


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_the_same(kind, compiler):
    graphs, backend = compiler
    torch.manual_seed(0)
    plain = MODELS[kind]()
    model = copy.deepcopy(plain)
    ids = torch.randint(97, (2, 33))
    found = []
    for call in (plain, InParts(model, backend=backend)):
        # The compiler takes grouped products in bfloat16 only.
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "experts"):
            loss = call(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        found.append(loss.detach())
    assert graphs
    torch.testing.assert_close(*found)
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad)


def test_one_program_serves_all_layers(compiler):
    graphs, backend = compiler
    model = LlamaForCausalLM(CONFIG)
    ids = torch.randint(97, (2, 33))
    InParts(model, backend=backend)(ids[:, :-1], targets=ids[:, 1:])
    assert len(graphs) == 2  # of a layer, and of the loss


def test_only_calls_through_it_are_compiled(compiler):
    """Afterwards the model is as before, even when a call has failed."""
    graphs, backend = compiler
    model = recompute(LlamaForCausalLM(CONFIG))
    before = [dict(vars(module)) for module in model.modules()]
    fast = InParts(model, backend=backend)
    assert inner(fast) is model
    ids = torch.randint(97, (2, 33))
    fast(ids[:, :-1], targets=ids[:, 1:])
    with pytest.raises(IndexError):
        fast(ids[:, :-1] + 97, targets=ids[:, 1:])
    assert [dict(vars(module)) for module in model.modules()] == before
    count = len(graphs)
    model(ids[:, :7])
    assert len(graphs) == count
