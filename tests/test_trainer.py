"""One step, the loop, validation."""

import math
import os
import sys
from pathlib import Path

import pytest
import torch

import llama_tut
from llama_tut.config import LlamaConfig
from llama_tut.loader import ShardLoader
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer
from llama_tut.pretraining import build_llama
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.ranks import Ranks
from llama_tut.trainer import evaluate, train_step, training_steps

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_micro_batches_and_their_number_do_not_matter(config, data):
    info = load_dataset_info(data)

    def step(B):
        torch.manual_seed(0)
        model = build_llama(config, info)
        optimizer = build_optimizer(model, "adamw", 1e-2)
        loader = ShardLoader(data, "train", B, 32)
        batches = [loader.next_batch() for _ in range(16 // B)]
        loss, norm = train_step(model, optimizer, batches)
        return loss, norm, *model.parameters()

    whole = step(16)
    for B in (1, 4, 8):
        torch.testing.assert_close(step(B), whole, rtol=1e-4, atol=1e-5)


def test_every_target_counts_once_however_they_are_spread(config, data):
    """Targets of -100, unevenly over micro batches and over ranks."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(64, (4, 17), generator=generator)
    inputs, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[0, 1:], targets[1, 5:], targets[3, :9] = -100, -100, -100
    counted = (targets >= 0).sum()

    def step(batches, mean=None):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(64, 32, 48, 2, 2))
        optimizer = build_optimizer(model, "adamw", 1e-2)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step = lambda: before.clear()  # keep the gradients
        optimizer.zero_grad = lambda: None
        loss, norm = train_step(
            model, optimizer, batches, max_norm=0, mean=mean
        )
        assert not before and math.isfinite(norm)
        return loss, [p.grad for p in model.parameters()]

    loss, whole = step([(inputs, targets)])
    parts = list(zip(inputs.split(1), targets.split(1), strict=True))
    apart, gradients = step(parts)
    assert apart == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(gradients, whole, rtol=1e-4, atol=1e-6)
    total = 0  # two ranks, one after the other: their mean is the whole
    for mine in (parts[:1], parts[1:]):

        def mean(own):
            return counted / 2.0 if own.dim() == 0 else own

        _, gradients = step(mine, mean)
        total += gradients[0] / 2
    torch.testing.assert_close(total, whole[0], rtol=1e-4, atol=1e-6)


def test_validation_depends_neither_on_batch_nor_on_ranks(config, data):
    model = build_llama(config, load_dataset_info(data))
    loader = ShardLoader(data, "val", 1, 32, shuffle=False)
    rows = min(7, len(loader))
    expected = []
    for _ in range(rows):
        inputs, targets = loader.next_batch()
        with torch.no_grad():
            logits = model(inputs)
        expected.append(
            torch.nn.functional.cross_entropy(logits[0], targets[0])
        )
    expected = torch.stack(expected).mean().item()
    for B in (1, 2, 3, rows):
        loader.batch_size = B
        found = evaluate(model, loader, rows)
        assert found == pytest.approx(expected, abs=1e-5)
    for W, loader.batch_size in ((2, 2), (3, 2), (4, 1), (8, 3)):
        sums = []  # of each rank: losses, tokens
        for rank in range(W):
            evaluate(
                model, loader, rows, rank=rank, world_size=W,
                mean=lambda own, sums=sums: sums.append(own) or own,
            )  # fmt: skip
        losses, tokens = torch.stack(sums).sum(0).tolist()
        assert tokens == rows * 32
        assert losses / tokens == pytest.approx(expected, abs=1e-5)
    assert model.training


def test_validation_is_in_eval_mode_and_training_goes_on_in_its_own(
    config, data
):
    model = build_llama(config, load_dataset_info(data))
    modes = []
    model.register_forward_hook(lambda m, *_: modes.append(m.training))
    loader = ShardLoader(data, "val", 1, 32, shuffle=False)
    evaluate(model, loader, 2)
    assert modes == [False, False] and model.training


def broken(value):
    """A model whose gradient holds one `value`; the loss is finite."""
    model = LlamaForCausalLM(LlamaConfig(64, 32, 48, 2, 2))
    model.model.norm.weight.register_hook(lambda g: g * value)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_taken(value):
    model = broken(value)
    optimizer = build_optimizer(model, "adamw", 1e-2)
    rows = torch.randint(64, (2, 17))
    batches = [(row[None, :-1], row[None, 1:]) for row in rows]
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="the gradient's norm"):
        train_step(model, optimizer, batches)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state and model.model.norm.weight.grad is None


@pytest.mark.parametrize("bad", [0, 1])
def test_all_ranks_refuse_what_one_of_them_has(bad):
    """The mean over ranks is not finite if one of two ranks is not."""
    model = LlamaForCausalLM(LlamaConfig(64, 32, 48, 2, 2))
    optimizer = build_optimizer(model, "adamw", 1e-2)
    rows = torch.randint(64, (2, 17))
    other = torch.tensor([4.0, 1.0])  # loss and norm of the other rank
    other[bad] = math.nan
    with pytest.raises(FloatingPointError):
        train_step(
            model, optimizer, [(rows[:, :-1], rows[:, 1:])],
            mean=lambda own: (own + other) / 2 if own.dim() else own,
        )  # fmt: skip
    assert not optimizer.state


PACKAGE = str(Path(llama_tut.__file__).parent) + os.sep


def test_a_step_passes_through_few_functions():
    """From train_step to the matrix products: at most 12 of our own."""
    model = LlamaForCausalLM(LlamaConfig(64, 32, 48, 2, 2))
    optimizer = build_optimizer(model, "adamw", 1e-2)
    rows = torch.randint(64, (2, 17))
    found = set()

    def note(frame, event, argument):
        code = frame.f_code
        # a property; and what Python 3.12 has no function for any more
        plain = code.co_name in ("output_weight", "<listcomp>")
        ours = code.co_filename.startswith(PACKAGE) and not plain
        if event == "call" and ours:
            found.add((Path(code.co_filename).name, code.co_qualname))

    sys.setprofile(note)
    try:
        train_step(model, optimizer, [(rows[:, :-1], rows[:, 1:])])
    finally:
        sys.setprofile(None)
    files = {name for name, _ in found}
    print(f"{len(found)} functions in {len(files)} files:")
    print("\n".join(f"  {file}: {name}" for file, name in sorted(found)))
    assert len(found) <= 12


def test_the_loop_takes_the_steps_that_it_is_asked_for():
    model = LlamaForCausalLM(LlamaConfig(64, 32, 48, 2, 2))
    optimizer = build_optimizer(model, "adamw", 1e-2)
    given = []

    def next_batch():
        rows = torch.randint(64, (2, 17))
        given.append(rows)
        return rows[:, :-1], rows[:, 1:]

    loop = training_steps(
        model, optimizer, next_batch, lambda step: 0.1 * step, 7, first=4, k=3
    )
    lines = list(loop)
    assert [line["step"] for line in lines] == [5, 6, 7]
    assert [line["lr"] for line in lines] == pytest.approx([0.4, 0.5, 0.6])
    assert len(given) == 9 and optimizer.param_groups[0]["lr"] == 0.1 * 6
