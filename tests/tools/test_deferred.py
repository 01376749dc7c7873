"""A model that is drawn later has the numbers of one that is built at once."""

import pytest
import torch

from llama_tut.config import LlamaConfig
from llama_tut.gpt2 import LadderConfig, LadderForCausalLM
from llama_tut.model import LlamaForCausalLM
from llama_tut.moe import MoEForCausalLM
from llama_tut.tools.deferred import build_deferred, draw
from llama_tut.tools.moe_config import MoEConfig

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "build, deferred",
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), True),
        (lambda: MoEForCausalLM(MoEConfig(**SIZES, mlp="mixtral")), True),
        (lambda: MoEForCausalLM(MoEConfig(**SIZES, mlp="deepseek")), True),
        # its biases are made of zeros, and never filled
        (lambda: LadderForCausalLM(LadderConfig(**SIZES)), False),
    ],
)
def test_equal_to_the_last_bit(build, deferred):
    torch.manual_seed(0)
    alone, state = build(), torch.get_rng_state()
    torch.manual_seed(0)
    model, draws = build_deferred(build)
    assert (draws is not None) == deferred
    if deferred:
        assert all(p.is_meta for p in model.parameters())
    model = draw(model, draws, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    pairs = (
        dict(m.named_parameters()) | dict(m.named_buffers())
        for m in (alone, model)
    )
    torch.testing.assert_close(*pairs, rtol=0, atol=0)
