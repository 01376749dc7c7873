"""Chapter 14: decay by name, Muon and its state, schedules."""

import copy
import math

import pytest
import torch

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import (
    Muon,
    build_optimizer,
    clip_gradients,
    decays,
    equal_shapes,
    learning_rate_at,
    newton_schulz,
    parameter_groups,
)
from llama_tut.tools.files import InputError


def small_model(tied=True):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(64, (2, 17), generator=generator)
        optimizer.zero_grad()
        model(rows[:, :-1], targets=rows[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.embed_tokens.weight", True),
        ("lm_head.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.norm.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("transformer.h.0.attn.c_attn.weight", True),
        ("transformer.h.0.attn.c_attn.bias", False),
        ("transformer.h.0.ln_1.weight", False),
        ("transformer.ln_f.weight", False),
        ("transformer.wpe.weight", True),
        ("norm.weight", False),
        ("weight", True),
    ],
)
def test_decay_by_name(name, expected):
    assert decays(name) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(name, tied):
    model = small_model(tied)
    groups = build_optimizer(model, name).param_groups
    grouped = [p for group in groups for p in group["params"]]
    names = [n for group in groups for n in group["param_names"]]
    assert len(grouped) == len(set(map(id, grouped)))
    assert set(names) == {n for n, _ in model.named_parameters()}
    hidden = {n for g in groups if g.get("muon") for n in g["param_names"]}
    expected = {n for n in names if "_proj." in n} if name == "muon" else set()
    assert hidden == expected
    for group in groups:
        decayed = {decays(n) for n in group["param_names"]}
        assert decayed == {group["weight_decay"] > 0}


def test_a_model_without_norms_has_one_group():
    groups = parameter_groups(torch.nn.Linear(3, 2, bias=False), 0.1)
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.1


def test_fused_equals_plain_adamw():
    """100 steps of what we build against torch's plain loop."""
    ours, theirs = small_model(), small_model()
    settings = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    plain = torch.optim.AdamW(
        parameter_groups(theirs, 0.1), foreach=False, **settings
    )
    built = build_optimizer(ours, "adamw", 1e-3, 0.1, (0.9, 0.95))
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(64, (2, 17), generator=generator)
        built.zero_grad()
        ours(rows[:, :-1], targets=rows[:, 1:]).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        built.step()
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_muon_splits_like_two_optimizers():
    """Muon's class against torch.optim.Muon and torch.optim.AdamW."""
    ours, theirs = small_model(), small_model()
    start = copy.deepcopy(ours)
    built = build_optimizer(ours, "muon", learning_rate=0.01)
    named = dict(theirs.named_parameters())
    hidden = [p for n, p in named.items() if "_proj." in n]
    tables = [p for n, p in named.items() if "embed" in n]
    norms = [p for n, p in named.items() if "norm" in n]
    settings = dict(lr=0.01, betas=(0.9, 0.95))
    pair = [
        torch.optim.Muon(
            hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": 0.1},
                {"params": norms, "weight_decay": 0.0},
            ],
            **settings,
        ),
    ]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    for optimizer in (built, *pair):
        optimizer.step()
    moved = zip(
        ours.parameters(), theirs.parameters(), start.parameters(), strict=True
    )
    for p, q, s in moved:
        assert (p - q).norm() <= 0.06 * (q - s).norm()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip_is_exact(name):
    """Four steps equal two, a load into a fresh optimizer, and two more."""
    whole = small_model()
    train(whole, build_optimizer(whole, name, 1e-2), 4)

    first = small_model()
    optimizer = build_optimizer(first, name, 1e-2)
    train(first, optimizer, 2)
    second = small_model()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, name, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, 2, first=2)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_muon_skips_parameters_without_gradient():
    p, q = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    q.grad = torch.randn(4, 4)
    Muon([{"params": [p, q], "muon": True}], lr=0.1).step()
    assert torch.equal(p, torch.ones(4, 4)) and not torch.equal(p, q)


def test_batches_hold_one_shape_and_no_more_than_the_limit():
    shapes = [(2, 3), (3, 2), (2, 3), (2, 3), (9, 9)]
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    batches = list(equal_shapes(parameters, limit=12))
    assert [len(b) for b in batches] == [2, 1, 1, 1]
    assert all(len({p.shape for p in b}) == 1 for b in batches)


def test_newton_schulz_of_zero_is_zero():
    assert torch.equal(
        newton_schulz(torch.zeros(2, 4, 3)).float(), torch.zeros(2, 4, 3)
    )


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(
    "steps, warmup", [(100, 10), (10, 0), (10, 10), (1, 0)]
)
def test_schedule(schedule, steps, warmup):
    rates = [
        learning_rate_at(n, 2.0, steps, warmup, schedule) for n in range(steps)
    ]
    top = rates.index(max(rates))
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if warmup:
        assert math.isclose(rates[warmup - 1], 2.0)
        assert math.isclose(rates[0], 2.0 / warmup)
    if steps > warmup:
        assert math.isclose(rates[-1], 0.2)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="take adamw or muon"):
        build_optimizer(small_model(), "sgd")
    with pytest.raises(InputError, match="take cosine or wsd"):
        learning_rate_at(0, 1.0, 10, 5, "linear")


def test_clipping_measures_at_infinity():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 100.0)
    norm = clip_gradients([p], math.inf)
    assert math.isclose(norm.item(), 100 * 3**0.5, rel_tol=1e-6)
    assert torch.equal(p.grad, torch.full((3,), 100.0))
