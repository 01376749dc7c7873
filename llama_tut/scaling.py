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
from scipy.optimize import least_squares
from scipy.special import logsumexp, softmax
from torch.nn import functional as F

from llama_tut.tools.devices import PEAKS
from llama_tut.tools.files import require

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
        """Nats a token of a model of N parameters after d tokens."""
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

    Args:
        compute: [n], the slice of each run in FLOPs.
        sizes: [n], parameters; losses: [n] or [R, n].

    Returns: slices [S] in FLOPs, best sizes [..., S], lowest losses [..., S],
        curvature [...].
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

    Args:
        x: [n]; y: [..., n]. Both are positive.

    Returns: scale [...], exponent [...].
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
    """A Frontier of runs: slice, parameters and loss of each.

    Args:
        compute, sizes: [n]; losses: [n], or [R, n] for R fits.
    """
    slices, best, lowest, curvature = isoflop_minima(compute, sizes, losses)
    laws = fit_power(slices, best), fit_power(slices, lowest)
    return Frontier(*laws, curvature)


# How sure: the bootstrap


def redraw(residuals, repeats, source, spent=5):
    """Residuals as another grid might have had them: [repeats, n + 1].

    Args:
        residuals: [n], around `spent` fitted numbers.
        source: a `torch.Generator`.
    """
    n = len(residuals)
    normal = torch.randn(repeats, n - spent, generator=source).double()
    size = (n / normal.square().sum(1, keepdim=True)).sqrt()
    rows = torch.randint(n, (repeats, n + 1), generator=source)
    return (residuals - residuals.mean())[rows] * size


def bootstrap_frontier(compute, sizes, losses, repeats=1000, seed=0):
    """Frontiers of redrawn grids: fitted losses with residuals of others.

    Returns: a Frontier with fields [R], and a further residual of each draw,
        [R], for a run that is not in the grid. R is `repeats`.
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
    """What a new run should give, from a grid.

    Args:
        compute, sizes, losses: [n], the grid.
        c, N: FLOPs and parameters of the new run.

    Returns: its loss, and [low, high], in which 95 of 100 such runs lie.
    """
    grid = compute, sizes, losses
    many, own = bootstrap_frontier(*grid, repeats, seed)
    loss = fit_frontier(*grid).predict(c, N).item()
    return loss, interval(many.predict(c, N) + own)


# A law of three terms

DELTA = 1e-3  # where Huber's loss turns straight, of Hoffmann et al.
STARTS = [(-1.0, 0.5), (5.0, 15.0), (5.0, 15.0), (0.3, 1.0), (0.3, 1.0)]


def law_terms(theta, log_n, log_d):
    """Logarithms of the three terms, [3, n].

    Args:
        theta: ln floor, ln a, ln b, alpha, beta; log_n, log_d: [n].
    """
    floor, a, b, alpha, beta = theta
    terms = floor + 0 * log_n, a - alpha * log_n, b - beta * log_d
    return np.stack(terms)


def descend(start, log_n, log_d, log_loss, free):
    """Lower Huber's loss from one start -> theta [5], the sum of the losses.

    Args:
        start: [5]; free: which of its numbers may move.
    """

    def whole(x):
        theta = np.array(start, dtype=float)
        theta[free] = x
        return theta

    def residuals(x):
        return logsumexp(law_terms(whole(x), log_n, log_d), 0) - log_loss

    def slopes(x):
        e, a, b = softmax(law_terms(whole(x), log_n, log_d), 0)
        return np.stack((e, a, b, -a * log_n, -b * log_d), 1)[:, free]

    x = np.array(start)[free]
    huber = {"loss": "huber", "f_scale": DELTA, "x_scale": "jac"}
    close = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-15, "max_nfev": 400}
    found = least_squares(residuals, x, slopes, **huber, **close)
    return whole(found.x), found.cost


def fit_law(N, d, losses, floor=None):
    """The Law that fits runs best, and how well.

    Args:
        N, d, losses: [n], float64.
        floor: a number to hold the floor at.

    Returns: a Law of floats, and the sum of Huber losses.
    """
    logs = [np.log(np.asarray(x)) for x in (N, d, losses)]
    held = {} if floor is None else {0: math.log(floor)}
    free = [i for i in range(5) if i not in held]
    starts = [(*held.values(),) if held else STARTS[0], *STARTS[1:]]
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
MEMORY = {"H100": 80e9, "H200": 141e9, "A100": 80e9, "4090": 24e9}


@dataclass(frozen=True)
class Plan:
    """A run before it is made; cost is None without a price."""

    size: float
    tokens: float
    flops: float
    hours: float
    device_hours: float
    cost: float | None
    state_bytes: float  # weights, gradients, AdamW: 16 bytes a parameter
    least_devices: int  # that hold this state, if it is cut

    def __str__(self):
        price = "" if self.cost is None else f", cost {short(self.cost)}"
        return (
            f"{short(self.size / 1e9)}B parameters, "
            f"{short(self.tokens / 1e9)}B tokens, {self.flops:.3g} FLOPs: "
            f"{short(self.hours)} hours, {short(self.device_hours)} device "
            f"hours{price}; {short(self.state_bytes / 1e9)} GB of state, on "
            f"{self.least_devices} or more devices"
        )


def short(x):
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def check_plan(device, mfu, flops, size, tokens, *others):
    """Refuse what makes no plan. Raises: InputError."""
    known = ", ".join(PEAKS)
    require(device in PEAKS, f"{device!r} is unknown: take {known}")
    given = (flops is not None, size is not None, tokens is not None)
    require(
        given in ((1, 0, 0), (1, 1, 0), (0, 1, 1)),
        "give flops, flops and size, or size and tokens",
    )
    numbers = (mfu, flops, size, tokens, *others)
    require(
        all(x > 0 for x in numbers if x is not None) and mfu <= 1,
        "all numbers are above 0, and mfu is at most 1",
    )


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

    Args:
        device: a row of PEAKS; devices: how many; mfu: part of the peak.
        price: of one device for one hour, in any currency.
        each: FLOPs a token (`flops_per_token`); default 6 * size.

    Raises: InputError for an unknown device or another set of numbers.
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
