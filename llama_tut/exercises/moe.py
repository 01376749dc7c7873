"""Checkers of chapter 26."""

import torch

from llama_tut.exercises import exercise, expect, expect_close, wrong


@exercise("moe.route")
def check_route(answer):
    """DeepSeek-V3's router, as a matrix of weights."""
    torch.manual_seed(0)
    logits, bias = torch.randn(20, 8), torch.randn(8)
    found = torch.as_tensor(answer(logits, bias, 3, 2.5)).detach()
    expect(
        found.shape == logits.shape,
        f"the result has shape {list(found.shape)}, it must be "
        f"{list(logits.shape)}: a weight for each token and expert, 0 where "
        "the expert was not chosen",
    )
    expect(
        ((found != 0).sum(-1) == 3).all(),
        "each token needs exactly k weights that are not 0",
    )
    scores = logits.sigmoid()
    right = pick(scores, scores + bias, 3)
    for weights, hint in (
        (pick(scores, scores, 3), "the bias is not used: add it to choose"),
        (pick(scores + bias, scores + bias, 3), "the bias is in the weights"),
        (
            pick(scores, logits + bias, 3),
            "the bias is added to the sigmoids, not to the logits",
        ),
        (
            pick(logits.softmax(-1), logits.softmax(-1) + bias, 3),
            "that is a softmax: DeepSeek-V3's scores are sigmoids",
        ),
    ):
        expect(not torch.allclose(found, 2.5 * weights, atol=1e-5), hint)
    expect(
        not torch.allclose(found, right, atol=1e-5),
        "the scale is missing: the k weights sum to it",
    )
    expect(
        not torch.allclose(found, 2.5 * scores * (right > 0), atol=1e-5),
        "the k weights are not divided by their sum",
    )
    every = 2.5 * scores * (right > 0) / scores.sum(-1, keepdim=True)
    expect(
        not torch.allclose(found, every, atol=1e-5),
        "divide by the sum of the chosen scores, not of all",
    )
    expect_close(found, 2.5 * right, "the weights are not right", 1e-4)


def pick(scores, choice, k):
    """Scores of the k best by `choice`, divided by their sum; others 0."""
    chosen = choice.topk(k, dim=-1).indices
    kept = torch.zeros_like(scores).scatter(1, chosen, 1.0) * scores
    return kept / kept.sum(-1, keepdim=True)


@wrong("moe.route", "is not used")
def no_bias(logits, bias, k, scale):
    scores = logits.sigmoid()
    return scale * pick(scores, scores, k)


@wrong("moe.route", "is in the weights")
def loud_bias(logits, bias, k, scale):
    scores = logits.sigmoid() + bias
    return scale * pick(scores, scores, k)


@wrong("moe.route", "not to the logits")
def bias_on_logits(logits, bias, k, scale):
    return scale * pick(logits.sigmoid(), logits + bias, k)


@wrong("moe.route", "that is a softmax")
def softmax_scores(logits, bias, k, scale):
    scores = logits.softmax(-1)
    return scale * pick(scores, scores + bias, k)


@wrong("moe.route", "the scale is missing")
def no_scale(logits, bias, k, scale):
    scores = logits.sigmoid()
    return pick(scores, scores + bias, k)


@wrong("moe.route", "divided by their sum")
def not_renormalised(logits, bias, k, scale):
    scores = logits.sigmoid()
    return scale * scores * (pick(scores, scores + bias, k) > 0)


@wrong("moe.route", "not of all")
def divided_by_all(logits, bias, k, scale):
    scores = logits.sigmoid()
    kept = scores * (pick(scores, scores + bias, k) > 0)
    return scale * kept / scores.sum(-1, keepdim=True)


@wrong("moe.route", "it must be")
def only_the_chosen(logits, bias, k, scale):
    scores = logits.sigmoid()
    weights = scores.gather(1, (scores + bias).topk(k).indices)
    return scale * weights / weights.sum(-1, keepdim=True)


SMALL = 50_304, 576, 2_304, 10, 8, 8, 8, 2


@exercise("moe.parameters")
def check_parameters(answer):
    """All and active parameters of a Mixtral."""
    found = answer(*SMALL)
    expect(
        isinstance(found, tuple | list) and len(found) == 2,
        "return two numbers: all, and active",
    )
    whole, active = counts(*SMALL)
    V, D, I, L, H, K, E, k = SMALL
    expect(found[0] != active, "the order is all, then active")
    for missing, hint in (
        (V * D, "the head is untied: embedding and head are two matrices"),
        (L * E * D, "the routers are missing: E rows of D in each layer"),
        (L * 2 * D + D, "the norms are missing: two a layer and the last"),
        (D, "the last norm is missing"),
    ):
        expect(found[0] != whole - missing, hint)
    expect(
        found[0] != whole - L * E * D * I,
        "an expert has three matrices, not two",
    )
    expect_close(found[0], whole, f"all: {whole:,}, not {found[0]:,}", 1e-9)
    expect(
        found[1] != active - L * (E - k) * D,
        "a token needs all rows of the router to choose",
    )
    expect(
        found[1] != round(whole * k / E),
        "only the experts are idle: everything else works for every token",
    )
    expect_close(
        found[1], active, f"active: {active:,}, not {found[1]:,}", 1e-9
    )
    shape = 32_000, 4_096, 14_336, 32, 32, 8, 8, 2
    expect(
        answer(*shape)[0] != counts(*shape[:5], 32, 8, 2)[0],
        "there are fewer key heads than query heads in Mixtral 8x7B: K",
    )
    expect_close(answer(*shape), counts(*shape), "wrong for 8x7B", 1e-9)


def counts(V, D, I, L, H, K, E, k):
    """(all, active)."""
    attention = 2 * D * D + 2 * D * (D // H) * K
    around = 2 * V * D + D + L * (attention + 2 * D + E * D)
    return around + L * E * 3 * D * I, around + L * k * 3 * D * I


@wrong("moe.parameters", "untied")
def tied(V, D, I, L, H, K, E, k):
    return tuple(n - V * D for n in counts(V, D, I, L, H, K, E, k))


@wrong("moe.parameters", "routers are missing")
def without_router(V, D, I, L, H, K, E, k):
    return tuple(n - L * E * D for n in counts(V, D, I, L, H, K, E, k))


@wrong("moe.parameters", "norms are missing")
def without_norms(V, D, I, L, H, K, E, k):
    return tuple(n - L * 2 * D - D for n in counts(V, D, I, L, H, K, E, k))


@wrong("moe.parameters", "only the experts are idle")
def a_share_of_all(V, D, I, L, H, K, E, k):
    whole, _ = counts(V, D, I, L, H, K, E, k)
    return whole, round(whole * k / E)


@wrong("moe.parameters", "all rows of the router")
def router_of_the_chosen(V, D, I, L, H, K, E, k):
    whole, active = counts(V, D, I, L, H, K, E, k)
    return whole, active - L * (E - k) * D


@wrong("moe.parameters", "fewer key heads")
def as_many_key_heads(V, D, I, L, H, K, E, k):
    return counts(V, D, I, L, H, H, E, k)


@exercise("moe.corrected")
def check_corrected(answer):
    """The cross-entropy out of a loss with a balancing term."""
    found = answer(2.957, 0.02, 2, 10)
    expect(
        abs(found - 2.937) > 1e-6,
        "transformers' term is k when the experts are balanced, not 1",
    )
    expect(abs(found - 2.997) > 1e-6, "the term was added: take it away")
    expect(
        abs(found - (2.957 - 0.4)) > 1e-6,
        "transformers pools the layers: their number does not matter",
    )
    expect(
        abs(found - (2.957 - 0.004)) > 1e-6,
        "transformers pools the layers: nothing is divided by their number",
    )
    expect_close(found, 2.917, f"it is 2.917, not {found}", 1e-6)
    expect_close(answer(3.5, 0.001, 8, 3), 3.492, "k is not always 2", 1e-6)


@wrong("moe.corrected", "is k when")
def as_in_switch(reported, factor, k, layers):
    return reported - factor


@wrong("moe.corrected", "take it away")
def added(reported, factor, k, layers):
    return reported + factor * k


@wrong("moe.corrected", "does not matter")
def for_each_layer(reported, factor, k, layers):
    return reported - factor * k * layers


@wrong("moe.corrected", "not always 2")
def always_two(reported, factor, k, layers):
    return reported - 0.04


@exercise("moe.reach")
def check_reach(answer):
    """How far biases get in n steps."""
    found = answer(300, 0.001)
    expect(
        isinstance(found, tuple | list) and len(found) == 2,
        "return two numbers: one bias from 0, and the gap of two",
    )
    expect(
        abs(found[0] - 0.001 * 300**0.5) > 1e-6,
        "that is a random walk: at most, all steps go one way",
    )
    expect(abs(found[0] - 0.299) > 1e-6, "all n steps move it, not n - 1")
    expect_close(found[0], 0.3, "one bias: n steps of one nudge", 1e-6)
    expect(
        abs(found[1] - 0.3) > 1e-6,
        "while one rises, another may fall: the gap can be twice as large",
    )
    expect_close(found[1], 0.6, "the gap: one at the top, one at the bottom")
    expect_close(answer(7, 0.01), (0.07, 0.14), "wrong for 7 steps of 0.01")


@wrong("moe.reach", "random walk")
def random_walk(n, nudge):
    return nudge * n**0.5, 2 * nudge * n**0.5


@wrong("moe.reach", "may fall")
def one_side(n, nudge):
    return n * nudge, n * nudge


@wrong("moe.reach", "not n - 1")
def one_step_less(n, nudge):
    return (n - 1) * nudge, 2 * (n - 1) * nudge
