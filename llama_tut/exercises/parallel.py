"""Checkers of chapter 24."""

import torch
import torch.distributed as dist

from llama_tut.exercises import Hint, exercise, expect, expect_close, wrong
from llama_tut.exercises.distributed import World

RANKS = 2


def pair_of_layers():
    """x [3, 4], the whole a [6, 4] and b [4, 6], and a gradient for y."""
    source = torch.Generator().manual_seed(0)
    shapes = (3, 4), (6, 4), (4, 6), (3, 4)
    return [torch.randn(shape, generator=source) for shape in shapes]


def one_process():
    """The result, and the gradients of x, a and b, of the whole pair."""
    x, a, b, gradient = pair_of_layers()
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = (x @ a.T).relu() @ b.T
    return y.detach(), *torch.autograd.grad(y, leaves, gradient)


def on_one_rank(answer, rank):
    """What `answer` gives on one rank: result and gradients."""
    x, a, b, gradient = pair_of_layers()
    parts = [x, a.chunk(RANKS)[rank], b.chunk(RANKS, 1)[rank]]
    leaves = [t.clone().requires_grad_() for t in parts]
    y = answer(*leaves)
    expect(
        isinstance(y, torch.Tensor) and y.requires_grad,
        "the result must be a tensor with a history, so that backward works",
    )
    expect(
        y.shape == gradient.shape,
        f"the result has shape {list(y.shape)}, it must be [T, D], "
        f"{list(gradient.shape)}, as x",
    )
    y.backward(gradient)
    for name, leaf in zip(("x", "a", "b"), leaves, strict=True):
        expect(leaf.grad is not None, f"no gradient arrives at {name}")
    return y.detach(), *(leaf.grad for leaf in leaves)


@exercise("parallel.layers")
def check_layers(answer):
    """Two matrices that are cut, on two ranks: result and gradients."""
    world = World(RANKS)
    results = world.run(lambda rank: on_one_rank(answer, rank))
    y, dx, da, db = one_process()
    for rank, (found, gx, ga, gb) in enumerate(results):
        if not torch.allclose(found, y, atol=1e-5):
            expect(
                not torch.allclose(found * RANKS, y, atol=1e-5),
                "the result is the mean over the ranks: it must be the sum",
            )
            raise Hint(
                "the result is not that of one process: each rank has a term "
                "of a sum, so the ranks must add their results"
            )
        expect_close(
            gb,
            db.chunk(RANKS, 1)[rank],
            "the gradient of b is wrong: the sum of the forward pass must "
            "pass its gradient on as it is, and not sum it once more",
        )
        expect_close(
            ga,
            da.chunk(RANKS)[rank],
            "the gradient of a is wrong, although that of b is right",
        )
        if not torch.allclose(gx, dx, atol=1e-5):
            expect(
                not torch.allclose(gx * RANKS, dx, atol=1e-5),
                "the gradient of x is the mean over the ranks, not the sum",
            )
            raise Hint(
                "the gradient of x is only this rank's share: x was used on "
                "all ranks, so backward must sum its gradients over them"
            )


def summed(forward, backward, scale=1.0):
    """A function that sums over the ranks in one direction or in both."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x = x.clone()
            if forward:
                dist.all_reduce(x)
                x = x * scale
            return x

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            if backward:
                dist.all_reduce(gradient)
                gradient = gradient * scale
            return gradient

    return Sum.apply


@wrong("parallel.layers", "ranks must add their results")
def no_sum(x, a, b):
    return summed(False, True)((x @ a.T).relu() @ b.T)


@wrong("parallel.layers", "only this rank's share")
def no_sum_backward(x, a, b):
    return summed(True, False)((x @ a.T).relu() @ b.T)


@wrong("parallel.layers", "not sum it once more")
def sum_both_ways(x, a, b):
    x = summed(False, True)(x)
    return summed(True, True)((x @ a.T).relu() @ b.T)


@wrong("parallel.layers", "it must be the sum")
def mean_of_results(x, a, b):
    x = summed(False, True)(x)
    return summed(True, False, 1 / RANKS)((x @ a.T).relu() @ b.T)


@wrong("parallel.layers", "the mean over the ranks, not the sum")
def mean_of_gradients(x, a, b):
    x = summed(False, True, 1 / RANKS)(x)
    return summed(True, False)((x @ a.T).relu() @ b.T)


@wrong("parallel.layers", "ranks must add their results")
def sum_too_early(x, a, b):
    x = summed(False, True)(x)
    return summed(True, False)(x @ a.T).relu() @ b.T


@wrong("parallel.layers", "must be [T, D]")
def not_transposed_back(x, a, b):
    x = summed(False, True)(x)
    return summed(True, False)((x @ a.T).relu() @ b.T).T


@wrong("parallel.layers", "a tensor with a history")
def without_history(x, a, b):
    y = ((x @ a.T).relu() @ b.T).detach()
    dist.all_reduce(y)
    return y


def pieces_of(rank):
    """(piece, cut) of a rank: three matrices cut, two gains on all ranks."""
    source = torch.Generator().manual_seed(1)
    found = []
    for shape, cut in (((4, 3), True), ((5,), False), ((2, 6), True)):
        whole = torch.randn(shape, generator=source)
        found.append((whole.chunk(RANKS)[rank] if cut else whole, cut))
    found.append((torch.randn(7, generator=source), False))
    return found


def true_norm():
    """The norm of the whole gradient."""
    both = [pieces_of(rank) for rank in range(RANKS)]
    total = 0.0
    for rank, pieces in enumerate(both):
        for piece, cut in pieces:
            total += piece.square().sum().item() * (cut or rank == 0)
    return total**0.5


@exercise("parallel.norm")
def check_norm(answer):
    """The norm of a gradient of which each rank holds pieces."""
    world = World(RANKS)
    found = world.run(lambda rank: answer(pieces_of(rank)))
    found = [float(torch.as_tensor(norm)) for norm in found]
    right = true_norm()
    own = [
        sum(p.square().sum().item() for p, _ in pieces_of(rank)) ** 0.5
        for rank in range(RANKS)
    ]
    expect(
        abs(found[0] - own[0]) > 1e-4 or abs(own[0] - right) < 1e-4,
        "this is the norm of what one rank holds: the ranks must add their "
        "squares",
    )
    expect(
        abs(found[0] - found[1]) < 1e-4,
        "the ranks return different norms, and would clip differently",
    )
    counted_twice = sum(norm**2 for norm in own) ** 0.5
    expect(
        abs(found[0] - counted_twice) > 1e-4,
        "what is not cut is the same gradient on all ranks, and you counted "
        "it once for each of them",
    )
    expect(
        abs(found[0] - right**2) > 1e-4,
        "this is the square of the norm: take the root",
    )
    expect(
        abs(found[0] - sum(own)) > 1e-4,
        "norms do not add up, their squares do",
    )
    expect_close(
        found[0],
        right,
        "not the norm: add the squares of the cut pieces over all ranks, add "
        "the squares of the others once, and take the root",
        1e-4,
    )
    expect(
        max(world.sent) == 1,
        f"right, but a rank sends {max(world.sent)} numbers: add up your own "
        "squares first, and send one number",
    )


def squares(gradients, twice=True, sends=True):
    total = torch.zeros(())
    for piece, cut in gradients:
        total += piece.square().sum() * (cut or twice)
    if sends:
        dist.all_reduce(total)
    for piece, cut in gradients:
        total += piece.square().sum() * (not cut and not twice)
    return total


@wrong("parallel.norm", "norm of what one rank holds")
def own_norm(gradients):
    return squares(gradients, sends=False).sqrt().item()


@wrong("parallel.norm", "once for each of them")
def gains_twice(gradients):
    return squares(gradients).sqrt().item()


@wrong("parallel.norm", "take the root")
def no_root(gradients):
    return squares(gradients, twice=False).item()


@wrong("parallel.norm", "their squares do")
def sum_of_norms(gradients):
    total = squares(gradients, sends=False).sqrt()
    dist.all_reduce(total)
    return total.item()


@wrong("parallel.norm", "not the norm")
def mean_of_squares(gradients):
    total = squares(gradients) / RANKS
    return total.sqrt().item()


@wrong("parallel.norm", "send one number")
def many_messages(gradients):
    total = torch.zeros(())
    for piece, cut in gradients:
        part = piece.square().sum()
        if cut:
            dist.all_reduce(part)
        total += part
    return total.sqrt().item()


@exercise("parallel.bytes")
def check_bytes(answer):
    """Bytes of an FSDP rank: pieces in float32, one unit in bfloat16."""
    for case in ((1000, 100, 4), (8_030_261_248, 1_050_677_248, 64)):
        N, unit, W = case
        found = float(torch.as_tensor(answer(*case)))
        for value, hint in (
            (16 * N + 4 * unit, "the pieces are not divided by the ranks"),
            (
                (16 * N + 4 * unit) / W,
                "the whole unit does not shrink when ranks are added",
            ),
            (16 * N / W, "one unit is whole, on top of the pieces"),
            (
                16 * N / W + 2 * unit,
                "the unit's gradient is whole, too, not only its weights",
            ),
            (
                16 * N / W + 8 * unit,
                "the unit is whole in bfloat16, 2 bytes per number",
            ),
            (
                8 * N / W + 4 * unit,
                "AdamW keeps two means for each parameter: 4 numbers in all",
            ),
            (
                12 * N / W + 4 * unit,
                "count four numbers of float32 for each parameter: weight, "
                "gradient, and AdamW's two means",
            ),
        ):
            expect(abs(found / value - 1) > 1e-6, hint)
        expect_close(
            found / (16 * N / W + 4 * unit),
            1.0,
            f"for N, unit and ranks of {case} it gives {found:,.0f}",
        )


@wrong("parallel.bytes", "not divided by the ranks")
def nothing_divided(parameters, unit, ranks):
    return 16 * parameters + 4 * unit


@wrong("parallel.bytes", "does not shrink")
def unit_divided(parameters, unit, ranks):
    return (16 * parameters + 4 * unit) / ranks


@wrong("parallel.bytes", "on top of the pieces")
def no_unit(parameters, unit, ranks):
    return 16 * parameters / ranks


@wrong("parallel.bytes", "gradient is whole, too")
def weights_only(parameters, unit, ranks):
    return 16 * parameters / ranks + 2 * unit


@wrong("parallel.bytes", "in bfloat16")
def unit_in_float32(parameters, unit, ranks):
    return 16 * parameters / ranks + 8 * unit


@wrong("parallel.bytes", "two means")
def no_state(parameters, unit, ranks):
    return 8 * parameters / ranks + 4 * unit


@wrong("parallel.bytes", "four numbers of float32")
def one_mean(parameters, unit, ranks):
    return 12 * parameters / ranks + 4 * unit


@exercise("parallel.tokens")
def check_tokens(answer):
    """Tokens at which FSDP and tensor parallelism send equally much."""
    for case in ((8_030_261_248, 32, 4096), (1000, 2, 5)):
        N, L, D = case
        found = float(torch.as_tensor(answer(*case))) * 8 * L * D / N
        for value, hint in (
            (6, "an all-reduce sends twice its size, once for each half"),
            (2, "FSDP gathers twice and scatters once: 3 N"),
            (1, "FSDP gathers twice and scatters once: 3 N"),
            (12, "that is the forward pass only, or one half of a message"),
            (1 / 3, "turned round: tokens are N over L D, not the reverse"),
            (3 * L, "every layer makes four all-reduces: divide by L"),
            (12 * L, "every layer makes four all-reduces: divide by L"),
        ):
            expect(abs(found - value) > 1e-6, hint)
        expect_close(
            found,
            3.0,
            f"for N, L and D of {case} it gives {float(answer(*case)):,.1f} "
            "tokens: set 3 N equal to what four all-reduces a layer send",
        )


@wrong("parallel.tokens", "twice its size")
def single_size(parameters, layers, hidden_size):
    return 3 * parameters / (4 * layers * hidden_size)


@wrong("parallel.tokens", "3 N")
def as_ddp(parameters, layers, hidden_size):
    return 2 * parameters / (8 * layers * hidden_size)


@wrong("parallel.tokens", "forward pass only")
def one_all_reduce(parameters, layers, hidden_size):
    return 3 * parameters / (2 * layers * hidden_size)


@wrong("parallel.tokens", "divide by L")
def one_layer(parameters, layers, hidden_size):
    return 3 * parameters / (8 * hidden_size)


@wrong("parallel.tokens", "set 3 N equal")
def forgets_width(parameters, layers, hidden_size):
    return 3 * parameters / (8 * layers)
