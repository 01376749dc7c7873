"""Checkers of chapter 23."""

import math

import numpy as np
from scipy.optimize import curve_fit

from llama_tut.exercises import exercise, expect, expect_close, wrong


@exercise("scaling.power")
def check_power(answer):
    """A power law by least squares of the logarithms."""
    xs = [1.0, 10.0, 100.0, 1000.0]
    found = answer(xs, [3 * x**-0.5 for x in xs])
    expect(
        isinstance(found, tuple | list) and len(found) == 2,
        "return two numbers: the scale and the exponent",
    )
    scale, p = map(float, found)
    expect(
        abs(scale + 0.5) > 1e-3 or abs(p - 3) > 1e-3,
        "the order is: scale, exponent",
    )
    expect(
        abs(scale - math.log(3)) > 1e-3 and abs(scale - math.log10(3)) > 1e-3,
        "that scale is still a logarithm: take its exponential",
    )
    expect(
        abs(p + 2) > 1e-3,
        "the other way round: that is x as a power of y",
    )
    expect(abs(p - 0.5) > 1e-3, "the exponent has the wrong sign")
    expect_close((scale, p), (3.0, -0.5), "3 * x ** -0.5 gives 3 and -0.5")
    ys = [4.0, 2.0, 1.5, 0.4]
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    a, b = sum(u) / 4, sum(v) / 4
    products = sum((x - a) * (y - b) for x, y in zip(u, v, strict=True))
    slope = products / sum((x - a) ** 2 for x in u)
    found = tuple(map(float, answer(xs, ys)))
    expect(
        abs(found[1] - (v[3] - v[0]) / (u[3] - u[0])) > 1e-3,
        "that line goes through the first and the last point: use all of them",
    )
    expect_close(
        found,
        (math.exp(b - slope * a), slope),
        "the least squares are those of the logarithms, not of the numbers",
    )


@wrong("scaling.power", "still a logarithm")
def no_exponential(xs, ys):
    p, log_scale = np.polyfit(np.log(xs), np.log(ys), 1)
    return log_scale, p


@wrong("scaling.power", "the order is")
def slope_first(xs, ys):
    p, log_scale = np.polyfit(np.log(xs), np.log(ys), 1)
    return p, math.exp(log_scale)


@wrong("scaling.power", "the other way round")
def x_from_y(xs, ys):
    p, log_scale = np.polyfit(np.log(ys), np.log(xs), 1)
    return math.exp(log_scale), p


@wrong("scaling.power", "first and the last point")
def two_points(xs, ys):
    p = math.log(ys[-1] / ys[0]) / math.log(xs[-1] / xs[0])
    return ys[0] / xs[0] ** p, p


@wrong("scaling.power", "of the logarithms")
def by_the_numbers(xs, ys):
    def power(x, scale, p):
        return scale * x**p

    return tuple(curve_fit(power, np.array(xs), np.array(ys), (3, -0.5))[0])


@exercise("scaling.factor")
def check_factor(answer):
    """The factor of compute that a lower loss takes."""
    found = answer(4.0, 3.6, 0.06, 0.0)
    expect(
        found > 1,
        "less loss takes more compute: divide the old loss by the new",
    )
    expect_close(
        found, (4 / 3.6) ** (1 / 0.06), "loss ratio = factor ** -q: solve it"
    )
    found = answer(4.0, 3.6, 0.06, 2.0)
    expect(
        abs(found / (4 / 3.6) ** (1 / 0.06) - 1) > 1e-3,
        "the floor is missing: what falls is the loss above it",
    )
    expect_close(
        found, (2 / 1.6) ** (1 / 0.06), "take the floor from both losses", 1e-4
    )
    for wanted in (2.0, 1.5):
        found = answer(4.0, wanted, 0.06, 2.0)
        expect(
            isinstance(found, float) and math.isinf(found),
            "at the floor or below it no compute will do: math.inf",
        )


@wrong("scaling.factor", "the floor is missing")
def without_floor(loss, wanted, q, floor):
    return (loss / wanted) ** (1 / q)


@wrong("scaling.factor", "takes more compute")
def upside_down(loss, wanted, q, floor):
    return ((wanted - floor) / (loss - floor)) ** (1 / q)


@wrong("scaling.factor", "no compute will do")
def never_infinite(loss, wanted, q, floor):
    if wanted == floor:
        return 1e99
    return abs((loss - floor) / (wanted - floor)) ** (1 / q)


@exercise("scaling.valley")
def check_valley(answer):
    """The lowest point of a parabola over the logarithm of the size."""

    def losses(sizes, best):
        return [3 + 0.1 * math.log(N / best) ** 2 for N in sizes]

    sizes = [1e5, 2e5, 8e5]
    found = answer(sizes, losses(sizes, 3e5))
    expect(
        found not in sizes,
        "the best of the three is not the lowest point of the parabola",
    )
    middles = (sum(sizes) / 3, math.prod(sizes) ** (1 / 3))
    middles += ((sizes[0] * sizes[2]) ** 0.5, (sizes[0] + sizes[2]) / 2)
    expect(
        all(abs(found / middle - 1) > 1e-6 for middle in middles),
        "that is a middle of the three sizes, whatever the losses are: the "
        "lowest point depends on them",
    )
    expect(
        found > 100, "that is the logarithm of the size: take its exponential"
    )
    expect_close(
        found / 3e5,
        1.0,
        "the parabola is over the logarithm of the size, not over the size",
        1e-4,
    )
    found = answer(sizes, losses(sizes, 2e6))
    expect_close(
        found / 2e6, 1.0, "the lowest point may lie beyond the three", 1e-4
    )


@wrong("scaling.valley", "whatever the losses are")
def geometric_mean(sizes, losses):
    return math.prod(sizes) ** (1 / 3)


@wrong("scaling.valley", "best of the three")
def best_of_three(sizes, losses):
    return min(zip(losses, sizes, strict=True))[1]


def vertex(x, y):
    (u, v, w), (f, g, h) = x, y
    left, right = (g - f) / (v - u), (h - g) / (w - v)
    return (u + v) / 2 - left * (w - u) / (2 * (right - left))


@wrong("scaling.valley", "over the logarithm of the size")
def over_the_size(sizes, losses):
    return vertex(sizes, losses)


@wrong("scaling.valley", "take its exponential")
def still_a_logarithm(sizes, losses):
    return vertex([math.log(N) for N in sizes], losses)
