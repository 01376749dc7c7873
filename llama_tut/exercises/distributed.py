"""Checkers of chapter 16."""

import threading
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from llama_tut.exercises import (
    Hint,
    exercise,
    expect,
    expect_close,
    wrong,
    wrong_variants,
)


class World:
    """Ranks as threads of this process, with `dist.all_reduce` between them."""

    def __init__(self, size):
        self.size, self.sent = size, [0] * size
        self.own = threading.local()
        self.slots = [None] * size
        self.barrier = threading.Barrier(size, timeout=10)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, **options):
        self.slots[self.own.rank] = tensor.detach().clone()
        self.sent[self.own.rank] += tensor.numel()
        self.barrier.wait()
        if len({slot.shape for slot in self.slots}) > 1:
            raise Hint(
                "the ranks call all_reduce with tensors of different shapes: "
                "all must send the same things in the same order"
            )
        total = torch.stack(self.slots).sum(0)
        if op == dist.ReduceOp.AVG:
            total /= self.size
        self.barrier.wait()
        tensor.detach().copy_(total)

    def run(self, function):
        """What `function(rank)` returns on each rank."""
        results, problems = [None] * self.size, []

        def work(rank):
            self.own.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:
                problems.append(error)
                self.barrier.abort()

        threads = [
            threading.Thread(target=work, args=(r,)) for r in range(self.size)
        ]
        with mock.patch.multiple(
            dist,
            all_reduce=self.all_reduce,
            get_world_size=lambda *_: self.size,
            get_rank=lambda *_: self.own.rank,
        ):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        real = [
            p
            for p in problems
            if not isinstance(p, threading.BrokenBarrierError)
        ]
        if real:
            raise real[0]
        expect(
            not problems,
            "a rank waits in all_reduce for ever: one of them calls it more "
            "often than the others",
        )
        return results


class Toy(nn.Module):
    """A model of four weights with the mean of squares as its loss."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.b = nn.Parameter(torch.tensor([0.25]))

    def forward(self, inputs, targets):
        return (inputs @ self.w + self.b - targets).square().mean()


def two_steps(take_step, world_size, optimizer):
    """Two steps of 3 x 2 micro batches: (models, losses, numbers sent)."""
    source = torch.Generator().manual_seed(0)
    shape = (2, 3, 2, 5)  # step, rank, micro batch, example
    inputs = torch.randn(*shape, 3, generator=source)
    targets = torch.randn(*shape, generator=source) * torch.arange(1, 4).view(
        1, 3, 1, 1
    )

    def on_rank(rank):
        model = Toy()
        made = optimizer(model.parameters())
        losses = []
        for step in range(2):
            mine = (inputs[step], targets[step])
            if world_size > 1:
                mine = (inputs[step, rank], targets[step, rank])
            batches = list(
                zip(*(m.reshape(-1, *m.shape[-1 - (m is mine[0]):])
                      for m in mine), strict=True)
            )  # fmt: skip
            losses.append(take_step(model, made, batches))
        return model, losses

    if world_size == 1:
        return on_rank(0)
    world = World(world_size)
    found = world.run(on_rank)
    return *zip(*found, strict=True), world.sent


def moved(model):
    """How far the weights are from where they began."""
    with torch.no_grad():
        pairs = zip(model.parameters(), Toy().parameters(), strict=True)
        return torch.cat([a - b for a, b in pairs])


def one_process(model, optimizer, batches):
    """The step that all ranks together must take."""
    loss = sum(model(x, targets=y) for x, y in batches) / len(batches)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


@exercise("distributed.step")
def check_step(answer):
    """A step of data parallelism, with accumulation, on three ranks."""
    models, losses, sent = two_steps(answer, 3, sgd)
    wanted, means = two_steps(one_process, 1, sgd)
    right, found = moved(wanted), [moved(model) for model in models]
    expect(
        found[0].any(),
        "the weights have not moved: where is optimizer.step()?",
    )
    expect(
        all(torch.allclose(one, found[0], atol=1e-6) for one in found),
        "the ranks' weights differ after the step: each has stepped with a "
        "gradient of its own",
    )
    if not torch.allclose(found[0], right, atol=1e-5):
        explain(answer, found[0])
    models, *_ = two_steps(answer, 3, adam)
    wanted, _ = two_steps(one_process, 1, adam)
    expect_close(
        moved(models[0]),
        moved(wanted),
        "right with plain gradient descent, wrong with AdamW: average the "
        "gradients before the optimizer sees them, not the weights after it",
        1e-4,
    )
    expect(
        max(sent) < 2 * 2 * 4,
        f"{max(sent)} numbers sent in two steps, for a model of 4: add up "
        "the gradients of all micro batches first, and send once",
    )
    hint = "return the mean loss over all ranks and micro batches"
    for own in losses:
        own = [float(x) for x in own]
        expect(
            abs(own[0] / means[0] - 3) > 1e-3,
            "the loss is the sum over the ranks, not the mean",
        )
        expect(
            abs(own[0] / means[0] - 2) > 1e-3,
            "the loss is the sum over the micro batches, not the mean",
        )
        expect_close(own, means, f"each rank returns its own loss: {hint}")


def explain(answer, found):
    """Say which scale is missing, if one is."""
    for factor, hint in (
        (3, "all_reduce gives the sum over the ranks: divide by their number"),
        (2, "the gradients of the micro batches add up: divide each loss by "
            "the number of micro batches"),
        (6, "the sum over ranks and micro batches: divide by both numbers"),
        (1 / 3, "divided by the number of ranks twice"),
        (1 / 2, "divided by the number of micro batches twice"),
    ):  # fmt: skip

        def scaled(model, optimizer, batches, factor=factor):
            loss = sum(model(x, targets=y) for x, y in batches) / len(batches)
            (factor * loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        other, _ = two_steps(scaled, 1, sgd)
        expect(not torch.allclose(found, moved(other), atol=1e-4), hint)

    def kept(model, optimizer, batches):
        loss = sum(model(x, targets=y) for x, y in batches) / len(batches)
        loss.backward()
        optimizer.step()
        return loss.item()

    other, _ = two_steps(kept, 1, sgd)
    expect(
        not torch.allclose(found, moved(other), atol=1e-4),
        "the second step still has the gradient of the first: zero it",
    )
    raise Hint("the ranks agree, but not with one process on all rows")


def rank_step(
    model, optimizer, batches, by_ranks=True, by_micro=True, zero=True,
    every=False, parameters=False, own_loss=False,
):  # fmt: skip
    """The step, with one thing after another left out."""
    W, k = dist.get_world_size(), len(batches) if by_micro else 1
    tensors = list(model.parameters())

    def average(found):
        for tensor in found:
            dist.all_reduce(tensor)
            if by_ranks:
                tensor /= W

    total = torch.zeros(())
    for i, (inputs, targets) in enumerate(batches):
        loss = model(inputs, targets=targets) / k
        loss.backward()
        total += loss.detach() * k / len(batches)
        if every or (i == len(batches) - 1 and not parameters):
            average([p.grad for p in tensors])
    optimizer.step()
    if zero:
        optimizer.zero_grad()
    if parameters:
        average([p.data for p in tensors])
    if not own_loss:
        dist.all_reduce(total)
        total /= W
    return total.item()


wrong_variants(
    "distributed.step",
    rank_step,
    {
        "sum_over_ranks": (
            dict(by_ranks=False),
            "sum over the ranks: divide",
        ),
        "sum_over_micro_batches": (
            dict(by_micro=False),
            "micro batches add up",
        ),
        "sum_of_everything": (
            dict(by_ranks=False, by_micro=False),
            "divide by both",
        ),
        "never_zeroed": (dict(zero=False), "zero it"),
        "sent_every_micro_step": (dict(every=True), "send once"),
        "weights_averaged": (
            dict(parameters=True),
            "average the gradients before",
        ),
        "loss_of_one_rank": (dict(own_loss=True), "returns its own loss"),
    },
)


@wrong("distributed.step", "a gradient of its own")
def averaged_too_late(model, optimizer, batches):
    for inputs, targets in batches:
        loss = model(inputs, targets=targets) / len(batches)
        loss.backward()
    optimizer.step()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    optimizer.zero_grad()
    return loss.item()


@wrong("distributed.step", "more often than the others")
def only_rank_zero_sends(model, optimizer, batches):
    for inputs, targets in batches:
        (model(inputs, targets=targets) / len(batches)).backward()
    if dist.get_rank() == 0:
        for p in model.parameters():
            dist.all_reduce(p.grad)
    optimizer.step()
    return 0.0


@exercise("distributed.rows")
def check_rows(answer):
    """Which rows has a rank, so that W does not change a step?"""

    def step_of(step, world_size, batch, rows=16):
        """The rows of all ranks and micro steps of a step, in their order."""
        micros = rows // (batch * world_size)
        places = [(m, r) for m in range(micros) for r in range(world_size)]
        parts = [answer(step, *p, world_size, batch, rows) for p in places]
        expect(
            all(len(part) == batch for part in parts),
            "a rank takes `batch` rows in a micro step",
        )
        return [list(part) for part in parts]

    for W, batch in ((2, 4), (4, 4), (1, 4), (2, 2), (8, 1)):
        parts = step_of(3, W, batch)
        flat = [row for part in parts for row in part]
        expect(
            W == 1 or parts[0] != parts[1],
            "all ranks get the same rows: the rank must move them",
        )
        expect(
            len(set(flat)) == 16,
            "some rows come twice within a step, and some never: in a micro "
            "step the ranks together take world_size * batch rows",
        )
        expect(
            set(flat) == set(range(48, 64)),
            f"step 3 of 16 rows has rows 48 to 63, not {min(flat)} to "
            f"{max(flat)}: where it begins depends on `step` and `rows` only",
        )
        expect(
            flat == list(range(48, 64)),
            "the step has its rows, but in another order: in a micro step all "
            "ranks read neighbouring rows, rank 0 first",
        )


@wrong("distributed.rows", "the same rows")
def rank_forgotten(step, micro, rank, world_size, batch, rows):
    first = step * rows + micro * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "come twice")
def micro_steps_overlap(step, micro, rank, world_size, batch, rows):
    first = step * rows + (micro + rank) * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "depends on `step` and `rows` only")
def step_of_one_rank(step, micro, rank, world_size, batch, rows):
    first = step * rows // world_size + (micro * world_size + rank) * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "in another order")
def a_block_a_rank(step, micro, rank, world_size, batch, rows):
    first = step * rows + rank * (rows // world_size) + micro * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "depends on `step` and `rows` only")
def counted_from_one(step, micro, rank, world_size, batch, rows):
    first = (step + 1) * rows + (micro * world_size + rank) * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "in another order")
def every_other_row(step, micro, rank, world_size, batch, rows):
    first = step * rows + micro * world_size * batch + rank
    return list(range(first, first + batch * world_size, world_size))


@wrong("distributed.rows", "takes `batch` rows")
def one_row_too_many(step, micro, rank, world_size, batch, rows):
    first = step * rows + (micro * world_size + rank) * batch
    return list(range(first, first + batch + 1))


@exercise("distributed.ring")
def check_ring(answer):
    """Reduce-scatter: half of a ring."""
    for W in (2, 3, 5):
        torch.manual_seed(W)
        chunks = [list(torch.randn(W, 2)) for _ in range(W)]
        total = torch.stack([torch.stack(c) for c in chunks]).sum(0)
        places = answer(chunks)
        expect(
            len(places) == W and set(places) == set(range(W)),
            "give one place for each rank, and each place once",
        )
        found = [torch.allclose(chunks[r][c], total[c], atol=1e-5)
                 for r in range(W) for c in range(W)]  # fmt: skip
        expect(
            sum(found) > 0,
            "no rank holds a whole sum: after the first round the chunk that "
            "travels on is the one that was just added to",
        )
        expect(
            sum(found) == W,
            f"{sum(found)} chunks hold a whole sum, with {W} ranks: it should "
            "be one a rank",
        )
        expect(
            all(found[r * W + c] for r, c in enumerate(places)),
            "the sums are right, but you name other places: follow one chunk "
            "around the ring",
        )


def rounds(chunks, chunk_of):
    """The ring, with a rule for the chunk that rank r sends in a round."""
    W = len(chunks)
    for move in range(W - 1):
        sent = [chunks[r][chunk_of(r, move, W)].clone() for r in range(W)]
        for r, message in enumerate(sent):
            chunks[(r + 1) % W][chunk_of(r, move, W)] += message


@wrong("distributed.ring", "you name other places")
def own_place(chunks):
    rounds(chunks, lambda r, move, W: (r - move) % W)
    return list(range(len(chunks)))


@wrong("distributed.ring", "just added to")
def same_chunk_always(chunks):
    rounds(chunks, lambda r, move, W: (r + move) % W)
    return [(r + 1) % len(chunks) for r in range(len(chunks))]


@wrong("distributed.ring", "just added to")
def nothing_sent(chunks):
    return [(r + 1) % len(chunks) for r in range(len(chunks))]


@wrong("distributed.ring", "should be one a rank")
def everything_to_everyone(chunks):
    W = len(chunks)
    for place in range(W):
        total = sum(chunks[r][place] for r in range(W))
        for r in range(W):
            chunks[r][place] = total.clone()
    return [(r + 1) % W for r in range(W)]


@wrong("distributed.ring", "just added to")
def one_round_short(chunks):
    W = len(chunks)
    for move in range(W - 2):
        sent = [chunks[r][(r - move) % W].clone() for r in range(W)]
        for r, message in enumerate(sent):
            chunks[(r + 1) % W][(r - move) % W] += message
    return [(r + 1) % W for r in range(W)]


@wrong("distributed.ring", "each place once")
def same_place_for_all(chunks):
    rounds(chunks, lambda r, move, W: (r - move) % W)
    return [0] * len(chunks)


@exercise("distributed.hide")
def check_hide(answer):
    """Tokens per rank whose backward pass is as long as the ring."""
    found = answer(8, 4e14, 1e11)
    for factor, hint in (
        (1 / 8, "`bits` counts bits: a byte has eight"),
        (1 / 2, "the ring goes around twice: once to sum, once to hand out"),
        (2, "a gradient in bfloat16 has two bytes"),
        (8 / 7, "a rank keeps one chunk of W: it sends (W - 1) / W of them"),
        (8, "no rank sends the whole gradient to all others, in a ring"),
        (
            2 / 3,
            "6N FLOPs per token are forward and backward; backward has 4N",
        ),
    ):
        expect(abs(found / 28_000 - factor) > 1e-3, hint)
    expect_close(found, 28_000.0, f"{found:,.0f} for 8 GPUs: it is 28,000")
    expect_close(answer(2, 1e15, 8e11), 10_000 * 0.5, "other values fail")


@wrong("distributed.hide", "a byte has eight")
def bits_as_bytes(world_size, flops, bits):
    return (world_size - 1) / world_size * flops / bits


@wrong("distributed.hide", "goes around twice")
def one_way(world_size, flops, bits):
    return (world_size - 1) / world_size * flops / (bits / 8) / 2


@wrong("distributed.hide", "(W - 1) / W")
def whole_ring(world_size, flops, bits):
    return flops / (bits / 8)


@wrong("distributed.hide", "backward has 4N")
def with_forward(world_size, flops, bits):
    return (world_size - 1) / world_size * flops / (bits / 8) * 2 / 3


@wrong("distributed.hide", "has two bytes")
def in_float32(world_size, flops, bits):
    return 2 * (world_size - 1) / world_size * flops / (bits / 8)


@wrong("distributed.hide", "sends the whole gradient to all")
def everyone_to_everyone(world_size, flops, bits):
    return world_size * flops / (bits / 8) * (1 - 1 / world_size)
