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


class GPT2Names(torch.nn.Module):
    """A block with GPT-2's names, and its tables."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(8, 4)
        self.h = torch.nn.ModuleList(
            [torch.nn.ModuleDict({
                "ln_1": torch.nn.LayerNorm(4), "c_attn": torch.nn.Linear(4, 4)
            })]
        )  # fmt: skip
        self.ln_f = torch.nn.LayerNorm(4)


def test_groups_go_by_dimensions_and_by_block():
    """Whatever the names: no gain and no bias decays, tables are not Muon's."""
    groups = parameter_groups(GPT2Names(), 0.1, muon=True)
    found = {
        (group["weight_decay"], group["muon"]): [n for n, _ in group["params"]]
        for group in groups
    }
    assert found == {
        (0.1, False): ["wte.weight"],
        (0.1, True): ["h.0.c_attn.weight"],
        (0.0, False): [
            "h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.c_attn.bias",
            "ln_f.weight", "ln_f.bias",
        ],
    }  # fmt: skip


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
        matrix = {p.dim() >= 2 for p in group["params"]}
        assert matrix == {group["weight_decay"] > 0}


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


def test_muon_is_nesterovs():
    """The update is that of the gradient ahead, not of the mean alone."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(16, 8))
    optimizer = Muon(
        [{"params": [p], "muon": True, "weight_decay": 0.0}], lr=1.0
    )
    mean = torch.zeros(16, 8)
    for _ in range(3):
        p.grad = torch.randn(16, 8)
        gradient, before = p.grad.clone(), p.detach().clone()
        optimizer.step()
        mean = 0.95 * mean + 0.05 * gradient
        ahead = 0.05 * gradient + 0.95 * mean
        scale = 0.2 * 16**0.5
        update = scale * newton_schulz(ahead[None])[0].float()
        plain = scale * newton_schulz(mean[None])[0].float()
        torch.testing.assert_close(before - p, update, rtol=0, atol=5e-3)
        if _ > 0:
            assert (before - p - plain).abs().max() > 0.05


def test_adamw_passes_over_muons_matrices():
    model = small_model()
    optimizer = build_optimizer(model, "muon", 1e-2)
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        keys = {key for p in group["params"] for key in optimizer.state[p]}
        wanted = {"step", "momentum"} if group["muon"] else None
        assert keys == (wanted or {"step", "exp_avg", "exp_avg_sq"})


def numbers_that_decay(parameters):
    groups = parameter_groups(parameters, 0.1)
    return sum(
        p.numel()
        for group in groups
        for _, p in group["params"]
        if group["weight_decay"]
    )


def test_the_rule_by_dimensions_fails_on_flattened_parameters():
    """PyTorch's first FSDP flattened a module: then nothing decays."""
    model = small_model()
    flat = torch.nn.Module()
    parts = [p.detach().flatten() for p in model.parameters()]
    flat.everything = torch.nn.Parameter(torch.cat(parts))
    gains = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    total = sum(p.numel() for p in model.parameters())
    assert numbers_that_decay(model) == total - gains
    assert numbers_that_decay(flat) == 0


def test_lost_decay_shows_in_the_weights_and_hardly_in_the_loss():
    successors = torch.randint(64, (64, 4), generator=torch.manual_seed(1))

    def batch(generator, rows=8):
        tokens = [torch.randint(64, (rows,), generator=generator)]
        for _ in range(32):
            choice = torch.randint(4, (rows,), generator=generator)
            tokens.append(successors[tokens[-1], choice])
        return torch.stack(tokens, 1)

    def loss_of(model, rows):
        return model(rows[:, :-1], targets=rows[:, 1:])

    norms, losses = {}, {}
    for decay in (1.0, 0.0):
        generator = torch.Generator().manual_seed(2)
        model, steps, late = small_model(), 200, []
        optimizer = build_optimizer(model, weight_decay=decay)
        for step in range(steps):
            lr = learning_rate_at(step, 5e-3, steps, 20)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of(model, batch(generator))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            late.append(loss.item())
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        norms[decay] = sum(p.detach().norm() ** 2 for p in matrices) ** 0.5
        losses[decay] = sum(late[-50:]) / 50
    assert abs(losses[0.0] - losses[1.0]) < 0.1
    assert norms[0.0] > 1.2 * norms[1.0]
    # And size does matter to a trained model: half of it costs.
    rows = batch(generator, 64)
    with torch.no_grad():
        whole = loss_of(model, rows)
        torch._foreach_mul_(matrices, 0.5)
        assert loss_of(model, rows) > whole + 0.2
