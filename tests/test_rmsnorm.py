"""RMSNorm against PyTorch and transformers; the errors that chapter 3 plants."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from llama_tut.rmsnorm import LlamaRMSNorm

D = 576


def pair(eps):
    """Our norm and transformers', with the same random gain."""
    ours = LlamaRMSNorm(D, eps)
    theirs = modeling_llama.LlamaRMSNorm(D, eps=eps)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2.0)
        theirs.weight.copy_(ours.weight)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_every_bit_is_that_of_transformers(dtype, eps):
    ours, theirs = pair(eps)
    x = (30 * torch.randn(2, 64, D)).to(dtype)
    assert torch.equal(ours.to(dtype)(x), theirs.to(dtype)(x))


def test_equal_to_torch():
    ours, _ = pair(1e-5)
    x = 30 * torch.randn(2, 64, D)
    torch.testing.assert_close(ours(x), F.rms_norm(x, (D,), ours.weight, 1e-5))


def test_the_default_eps_is_that_of_llama_3():
    """A hundredth of the eps in the input: the default shows."""
    assert LlamaRMSNorm(D).eps == 1e-5
    x = 1e-3 * torch.randn(2, D)
    found = LlamaRMSNorm(D)(x)
    torch.testing.assert_close(found, F.rms_norm(x, (D,), None, 1e-5))
    assert not torch.allclose(found, F.rms_norm(x, (D,), None, 1e-6))


def test_gradients():
    """A coarse step, as the class works in float32."""
    norm = LlamaRMSNorm(5)
    x = torch.randn(2, 3, 5, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, gain: norm(x), (x, norm.weight), eps=1e-2, atol=1e-3
    )


def test_the_gradient_is_orthogonal_to_the_input():
    x = torch.randn(4, D, requires_grad=True)
    LlamaRMSNorm(D, eps=0.0)(x).pow(3).sum().backward()
    assert F.cosine_similarity(x, x.grad, dim=-1).abs().max() < 1e-5


def test_large_numbers_in_half_stay_finite():
    x = torch.full((1, D), 30_000.0, dtype=torch.half)
    assert torch.equal(LlamaRMSNorm(D).half()(x), torch.ones_like(x))


def test_a_zero_vector_stays_zero():
    assert torch.equal(LlamaRMSNorm(D)(torch.zeros(1, D)), torch.zeros(1, D))


def test_init_weights_sets_ones():
    norm = LlamaRMSNorm(D)
    with torch.no_grad():
        norm.weight.fill_(7)
    norm.init_weights(std=0.02, output_std=0.01)
    assert torch.equal(norm.weight, torch.ones(D))
