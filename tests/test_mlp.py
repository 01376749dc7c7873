"""The SwiGLU MLP against transformers, and what its chapter does not show."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from llama_tut.config import LlamaConfig
from llama_tut.mlp import LlamaMLP

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=56)


def pair():
    """Our MLP and transformers' with the same weights."""
    ours = LlamaMLP(CONFIG)
    theirs = modeling_llama.LlamaMLP(
        modeling_llama.LlamaConfig(hidden_size=32, intermediate_size=56)
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_transformers(dtype):
    ours, theirs = (module.to(dtype) for module in pair())
    x = torch.randn(2, 7, 32).to(dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(x) for m, x in zip((ours, theirs), xs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_token_reaches_only_itself():
    x = torch.randn(1, 7, 32, requires_grad=True)
    pair()[0](x)[0, 3].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [t == 3 for t in range(7)]


def test_gate_and_up_are_not_exchanged():
    ours, theirs = pair()
    state = ours.state_dict()
    state["gate_proj.weight"], state["up_proj.weight"] = (
        state["up_proj.weight"],
        state["gate_proj.weight"],
    )
    ours.load_state_dict(state)
    x = torch.randn(2, 7, 32)
    assert not torch.allclose(ours(x), theirs(x), atol=1e-3)


def test_init_weights_draws_the_output_matrix_apart():
    mlp = LlamaMLP(LlamaConfig(hidden_size=256, intermediate_size=512))
    mlp.init_weights(0.05, 0.01, torch.Generator().manual_seed(0))
    for layer, std in (
        (mlp.gate_proj, 0.05),
        (mlp.up_proj, 0.05),
        (mlp.down_proj, 0.01),
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
    again = LlamaMLP(LlamaConfig(hidden_size=256, intermediate_size=512))
    again.init_weights(0.05, 0.01, torch.Generator().manual_seed(0))
    assert torch.equal(mlp.up_proj.weight, again.up_proj.weight)
