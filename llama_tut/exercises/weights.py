"""Checkers of chapter 9."""

from dataclasses import replace

import torch

from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.weights import empty_model


@exercise("weights.bisect")
def check_bisect(answer):
    """The first block after which two models differ, by bisection."""
    for L in (30, 32, 7, 1):
        most = (L - 1).bit_length()
        for fault in range(L):
            calls = []

            def equal(n, fault=fault, calls=calls, L=L):
                expect(0 <= n < L, f"there is no block {n} of {L}")
                calls.append(n)
                return n < fault

            found = answer(equal, L)
            expect(
                found != fault - 1,
                "you return the last good block; the wrong one is the next",
            )
            expect(
                found == fault,
                f"block {fault} of {L} is wrong, you say {found}",
            )
            expect(
                len(calls) <= most,
                f"{len(calls)} calls for {L} blocks, {most} are enough: ask in "
                "the middle of what is left",
            )


@wrong("weights.bisect", "in the middle")
def one_by_one(equal, L):
    return next(n for n in range(L) if n == L - 1 or not equal(n))


@wrong("weights.bisect", "the last good block")
def last_good(equal, L):
    low, high = 0, L - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if equal(middle) else (low, middle)
    return low - 1


@wrong("weights.bisect", "the last good block")
def skips_one(equal, L):
    low, high = 0, L - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if equal(middle) else (low, middle - 1)
    return low


@exercise("weights.names")
def check_names(answer):
    """The names of a checkpoint's tensors."""
    tied = LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True)
    for config in (tied, replace(tied, tie_word_embeddings=False)):
        found, wanted = (
            set(answer(config)),
            set(empty_model(config).state_dict()),
        )
        extra, missing = sorted(found - wanted), sorted(wanted - found)
        expect(
            extra != ["lm_head.weight"],
            "a tied file has no head: it is the embedding",
        )
        expect(
            missing != ["lm_head.weight"],
            "an untied model has a head of its own",
        )
        expect(
            missing != ["model.norm.weight"],
            "the norm in front of the head is missing",
        )
        expect(not missing, f"{len(missing)} are missing, as {missing[:1]}")
        expect(not extra, f"{len(extra)} are no tensors, as {extra[:1]}")


def names(config, head, last_norm=True):
    found = set(empty_model(config).state_dict()) - {"lm_head.weight"}
    found -= set() if last_norm else {"model.norm.weight"}
    return found | ({"lm_head.weight"} if head else set())


@wrong("weights.names", "a tied file has no head")
def always_a_head(config):
    return names(config, True)


@wrong("weights.names", "a head of its own")
def never_a_head(config):
    return names(config, False)


@wrong("weights.names", "in front of the head")
def no_last_norm(config):
    return names(config, not config.tie_word_embeddings, False)


@exercise("weights.error")
def check_error(answer):
    """The relative error of the worst token."""
    reference = torch.ones(100, 4)
    reference[0] *= 1000  # the first token is long
    h = reference.clone()
    h[7] *= 1.5
    found = float(answer(h, reference))
    whole = (h - reference).norm() / reference.norm()
    each = (h - reference).norm(dim=-1) / reference.norm(dim=-1)
    expect(
        abs(found - whole) > 1e-6,
        "one norm over all tokens: the long first token hides the wrong one",
    )
    expect(
        abs(found - each.mean()) > 1e-6,
        "a mean over tokens hides one wrong token among a hundred",
    )
    expect(
        abs(found - 1.0) > 1e-6,
        "divide by the length of the reference",
    )
    expect(
        abs(found - 1 / 3) > 1e-6,
        "divide by the reference, not by the vector that is tested",
    )
    expect_close(found, 0.5, "one token is half too long: the error is 0.5")


@wrong("weights.error", "hides the wrong one")
def one_norm(h, reference):
    return ((h - reference).norm() / reference.norm()).item()


@wrong("weights.error", "a mean over tokens")
def mean_of_tokens(h, reference):
    each = (h - reference).norm(dim=-1) / reference.norm(dim=-1)
    return each.mean().item()


@wrong("weights.error", "not by the vector that is tested")
def divides_by_h(h, reference):
    return ((h - reference).norm(dim=-1) / h.norm(dim=-1)).max().item()


@wrong("weights.error", "length of the reference")
def absolute(h, reference):
    return (h - reference).norm(dim=-1).max().item()
