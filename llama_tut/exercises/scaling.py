"""Checkers of chapter 23."""

import math

from llama_tut.exercises import exercise, expect, expect_close, wrong


@exercise("scaling.growth")
def check_growth(answer):
    """How the best size and the best number of tokens grow with compute."""
    found = answer(0.34, 0.28)
    expect(len(found) == 2, "give two exponents: of N and of d")
    p, q = found
    expect(
        abs(p - 0.34 / 0.62) > 1e-3,
        "the other way round: if tokens help quickly (large beta), few are "
        "needed, and the compute goes into size",
    )
    expect(abs(p - 0.28) > 1e-3, "N d grows as c, so p + q must be 1")
    expect(abs(p - 0.5) > 1e-3, "a half only if alpha and beta are equal")
    expect_close(p + q, 1.0, "N d grows as c, so p + q must be 1")
    expect_close(p, 0.28 / 0.62, "set the derivative by N to zero")
    expect_close(answer(0.5, 0.5), (0.5, 0.5), "equal exponents share alike")


@wrong("scaling.growth", "the other way round")
def exchanged(alpha, beta):
    return alpha / (alpha + beta), beta / (alpha + beta)


@wrong("scaling.growth", "p + q must be 1")
def plain(alpha, beta):
    return beta, alpha


@wrong("scaling.growth", "only if alpha and beta are equal")
def halves(alpha, beta):
    return 0.5, 0.5


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
