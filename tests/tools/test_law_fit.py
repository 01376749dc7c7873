"""The fit of a law of three terms from one start."""

import numpy as np

from llama_tut.tools.law_fit import descend, law_terms

LAW = np.array([0.5, 6.0, 6.0, 0.34, 0.28])
LOG_N, LOG_D = np.linspace(14, 20, 12), np.tile(np.linspace(17, 23, 4), 3)
LOG_LOSS = np.logaddexp.reduce(law_terms(LAW, LOG_N, LOG_D), 0)


def test_a_planted_law_comes_back():
    found, misfit = descend(
        LAW * 1.02, LOG_N, LOG_D, LOG_LOSS, [0, 1, 2, 3, 4]
    )
    assert misfit < 1e-12
    np.testing.assert_allclose(found, LAW, rtol=1e-3)


def test_what_is_not_free_stays():
    start = LAW.copy()
    start[0] = 0.2
    found, misfit = descend(start, LOG_N, LOG_D, LOG_LOSS, [1, 2, 3, 4])
    assert found[0] == 0.2 and misfit > 1e-9
