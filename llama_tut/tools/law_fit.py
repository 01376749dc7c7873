"""The law of three terms, fitted from one start by scipy."""

import numpy as np
from scipy.optimize import least_squares

DELTA = 1e-3  # where Huber's loss turns straight, of Hoffmann et al.


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

    With ln floor, ln a and ln b as unknowns all three stay positive, and the
    logarithm of the loss is the logsumexp of the three terms. Its derivative
    is a softmax: the share of each term in the loss. (`scipy.special` has
    both, but needs more time to look at its arguments than for the sums.)

    Args:
        start: [5]; free: which of its numbers may move.
    """

    def whole(x):
        theta = np.array(start, dtype=float)
        theta[free] = x
        return theta

    def residuals(x):
        terms = law_terms(whole(x), log_n, log_d)
        return np.logaddexp.reduce(terms, 0) - log_loss

    def slopes(x):
        terms = law_terms(whole(x), log_n, log_d)
        e, a, b = np.exp(terms - np.logaddexp.reduce(terms, 0))
        return np.stack((e, a, b, -a * log_n, -b * log_d), 1)[:, free]

    x = np.array(start)[free]
    huber = {"loss": "huber", "f_scale": DELTA, "x_scale": "jac"}
    close = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-15, "max_nfev": 400}
    found = least_squares(residuals, x, slopes, **huber, **close)
    return whole(found.x), found.cost
