# From notebooks/23_scaling.ipynb by scripts/export.py: edit the notebook.
"""Scaling: isoFLOP curves, a frontier, a law of three terms, and a planner.

Letters: N parameters. Small letters, as the capitals are taken: c compute of
a run in FLOPs, d its tokens, n runs; R fits at once.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from llama_tut.tools.devices import PEAKS
from llama_tut.tools.law_fit import descend
from llama_tut.tools.plans import MEMORY, Plan, check_plan

# By hand: where to spend it


@dataclass(frozen=True)
class Law:
    """loss = floor + a / N ** alpha + b / d ** beta, for c = 6 N d FLOPs.

    Hoffmann et al. (2022) write E, A, B and D for floor, a, b and d. The
    fields are numbers, or tensors [R] for many fits at once.
    """

    floor: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, N, d):
        """Nats per token of a model of N parameters after d tokens."""
        return self.floor + self.a * N**-self.alpha + self.b * d**-self.beta

    @property
    def exponent(self):
        """How the best size grows with compute."""
        return self.beta / (self.alpha + self.beta)

    def best(self, c):
        """Parameters and tokens of the lowest loss for c FLOPs."""
        ratio = (self.alpha * self.a) / (self.beta * self.b)
        N = ratio ** (1 / (self.alpha + self.beta)) * (c / 6) ** self.exponent
        return N, c / 6 / N


# IsoFLOP curves


def isoflop_minima(compute, sizes, losses):
    """The lowest point of each slice: parabolas in ln N of one curvature.

    compute, the slice of each run in FLOPs [n], sizes [n], losses [..., n]
    -> slices [S], best sizes [..., S], lowest losses [..., S], curvature [...]
    """
    slices, own = compute.unique(return_inverse=True)
    own = F.one_hot(own, len(slices)).double()
    middle = sizes.log().mean()
    x = (sizes.log() - middle)[:, None]
    design = torch.cat((own, own * x, x.square()), 1)  # [n, 2S + 1]
    solution = losses @ torch.linalg.pinv(design).mT
    height, slope, curvature = solution.split((len(slices),) * 2 + (1,), -1)
    vertex = -slope / (2 * curvature)
    lowest = height + slope * vertex / 2
    return slices, (vertex + middle).exp(), lowest, curvature[..., 0]


# The frontier


def fit_power(x, y):
    """y = scale * x ** exponent, by least squares of the logarithms.

    x [n], y [..., n], both positive -> scale [...], exponent [...]
    """
    u, v = x.log(), y.log()
    u = u - u.mean()
    exponent = (v * u).sum(-1) / u.square().sum()
    scale = (v.mean(-1) - exponent * x.log().mean()).exp()
    return scale, exponent


def power(law, x):
    """scale * x ** exponent -> [...], or [..., n] for x [n]."""
    x = torch.as_tensor(x, dtype=torch.float64)
    scale, exponent = (p[..., None] if x.dim() else p for p in law)
    return scale * x**exponent


@dataclass(frozen=True)
class Frontier:
    """The best size and the lowest loss as power laws of compute.

    The fields are scalars, or tensors [R] for many fits at once.
    """

    size: tuple  # scale and exponent of the best N
    loss: tuple  # of the lowest loss; the exponent is negative
    curvature: torch.Tensor  # nats a squared unit of ln N

    def best_size(self, c):
        """Parameters of the best model for c FLOPs."""
        return power(self.size, c)

    def predict(self, c, N):
        """Loss of a model of N parameters after c FLOPs; [n] or scalars."""
        N = torch.as_tensor(N, dtype=torch.float64)
        off = (N.log() - self.best_size(c).log()).square()
        k = self.curvature[..., None] if N.dim() else self.curvature
        return power(self.loss, c) + k * off


def fit_frontier(compute, sizes, losses):
    """A Frontier of runs: compute, sizes [n], losses [n] or [R, n]."""
    slices, best, lowest, curvature = isoflop_minima(compute, sizes, losses)
    laws = fit_power(slices, best), fit_power(slices, lowest)
    return Frontier(*laws, curvature)


# How sure: the bootstrap


def redraw(residuals, repeats, source, spent=5):
    """Residuals [n], around `spent` fitted numbers, as another grid might
    have had them: [repeats, n + 1]."""
    n = len(residuals)
    normal = torch.randn(repeats, n - spent, generator=source).double()
    size = (n / normal.square().sum(1, keepdim=True)).sqrt()
    rows = torch.randint(n, (repeats, n + 1), generator=source)
    return (residuals - residuals.mean())[rows] * size


def bootstrap_frontier(compute, sizes, losses, repeats=1000, seed=0):
    """Frontiers of redrawn grids: fitted losses with residuals of others.

    Returns a Frontier with fields [R], R repeats, and a further residual of
    each draw, [R], for a run that is not in the grid.
    """
    fitted = fit_frontier(compute, sizes, losses).predict(compute, sizes)
    source = torch.Generator().manual_seed(seed)
    drawn = redraw(losses - fitted, repeats, source)
    many = fit_frontier(compute, sizes, fitted + drawn[:, :-1])
    return many, drawn[:, -1]


def interval(draws, level=0.95):
    """The middle part of the draws [R] -> [low, high], two floats."""
    edge = (1 - level) / 2
    return draws.quantile(torch.tensor([edge, 1 - edge]).to(draws)).tolist()


def predict_run(compute, sizes, losses, c, N, repeats=1000, seed=0):
    """What a grid [n] says of a new run of c FLOPs and N parameters.

    Returns its loss, and [low, high], in which 95 of 100 such runs lie.
    """
    grid = compute, sizes, losses
    many, own = bootstrap_frontier(*grid, repeats, seed)
    loss = fit_frontier(*grid).predict(c, N).item()
    return loss, interval(many.predict(c, N) + own)


# A law of three terms

# ln floor, ln a, ln b, alpha, beta
STARTS = [(-1.0, 0.5), (5.0, 15.0), (5.0, 15.0), (0.3, 1.0), (0.3, 1.0)]


def fit_law(N, d, losses, floor=None, starts=STARTS):
    """The Law that fits runs best, and its sum of Huber losses.

    N, d, losses: [n], float64; floor: a number to hold the floor at; starts:
    the values from which each of the five numbers starts.
    """
    logs = [np.log(np.asarray(x)) for x in (N, d, losses)]
    held = {} if floor is None else {0: math.log(floor)}
    free = [i for i in range(5) if i not in held]
    starts = [(*held.values(),) if held else starts[0], *starts[1:]]
    ends = [descend(s, *logs, free) for s in itertools.product(*starts)]
    theta, misfit = min(ends, key=lambda end: end[1])
    return Law(*np.exp(theta[:3]).tolist(), *theta[3:].tolist()), float(misfit)


def bootstrap_law(N, d, losses, law, repeats=300, seed=0):
    """Laws of redrawn runs, from the fit of all -> Law of tensors [R]."""
    logs = np.stack([np.log(np.asarray(x)) for x in (N, d, losses)])
    start = [*map(math.log, (law.floor, law.a, law.b)), law.alpha, law.beta]
    random = np.random.default_rng(seed)
    thetas = []
    for _ in range(repeats):
        rows = random.integers(logs.shape[1], size=logs.shape[1])
        thetas.append(descend(start, *logs[:, rows], list(range(5)))[0])
    thetas = torch.tensor(np.stack(thetas))  # [R, 5]
    return Law(*thetas[:, :3].exp().unbind(1), *thetas[:, 3:].unbind(1))


# A planner

BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # arXiv 2404.10102


def plan_run(
    device,
    devices=1,
    mfu=0.4,
    price=None,
    *,
    flops=None,
    size=None,
    tokens=None,
    each=None,
    law=BESIROGLU,
):
    """A Plan from FLOPs, from FLOPs and a size, or from size and tokens.

    device is a row of PEAKS, mfu a share of its peak, price that of a device
    and hour; each: FLOPs per token, default 6 * size. Raises: InputError.
    """
    check_plan(device, mfu, flops, size, tokens, devices, price, each)
    if size is None:
        size, _ = law.best(flops)
    each = each or 6 * size
    if flops is None:
        flops = each * tokens
    hours = flops / (devices * PEAKS[device] * mfu) / 3600
    return Plan(
        size=size,
        tokens=flops / each,
        flops=flops,
        hours=hours,
        device_hours=hours * devices,
        cost=None if price is None else hours * devices * price,
        state_bytes=16 * size,
        least_devices=math.ceil(16 * size / MEMORY[device]),
    )
