"""Checkers of chapter 9."""

import torch

from llama_tut.config import LlamaConfig
from llama_tut.exercises import Hint, exercise, expect, expect_close, wrong
from llama_tut.model import LlamaForCausalLM


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
                found != fault + 1,
                "you return the block after the wrong one: blocks count from "
                "0, and equal(n) is asked after block n",
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


@wrong("weights.bisect", "the block after the wrong one")
def counts_from_one(equal, L):
    return last_good(equal, L) + 2


@wrong("weights.bisect", "the last good block")
def skips_one(equal, L):
    low, high = 0, L - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if equal(middle) else (low, middle - 1)
    return low


def small():
    """A model whose matrices are all 8 x 8, and tensors for it."""
    model = LlamaForCausalLM(
        LlamaConfig(8, 8, 8, 1, 2, tie_word_embeddings=True)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    order = list(model.state_dict())
    tensors = {
        name: torch.full_like(model.state_dict()[name], order.index(name) + 1)
        for name in order
    }
    # Files have an order of their own; here equal shapes are exchanged.
    matrices = [name for name in order if tensors[name].dim() == 2][::-1]
    gains = [name for name in order if tensors[name].dim() == 1][::-1]
    mixed = [
        (matrices if tensors[name].dim() == 2 else gains).pop(0)
        for name in order
    ]
    tensors = {name: tensors[name] for name in mixed}
    return model, tensors


def outcome(answer, model, tensors):
    """What the answer returned, and what it raised: one of them is None."""
    try:
        return answer(model, tensors), None
    except Hint:  # it returned nothing
        raise
    except Exception as error:  # the reader's code may raise anything
        return None, error


GATE = "model.layers.0.mlp.gate_proj.weight"


@exercise("weights.load")
def check_load(answer):
    """A dictionary of tensors into a model, every one accounted for."""
    model, tensors = small()
    lists, error = outcome(answer, model, tensors)
    expect(
        error is None,
        f"every tensor fits, and yet you raise {type(error).__name__}: go by "
        "name, since a file has an order of its own",
    )
    lacking, unused = lists
    state = model.state_dict()
    expect(
        any(tensor.any() for tensor in state.values()),
        "the model is as it was: write into the tensors of state_dict() with "
        "copy_, since the dictionary itself is a copy",
    )
    for name, tensor in state.items():
        expect(
            torch.equal(tensor, tensors[name]),
            f"{name} holds another tensor's numbers: go by name, not by order",
        )
    expect(
        (list(lacking), list(unused)) == ([], []),
        f"every tensor fits, you report {list(lacking)} and {list(unused)}",
    )
    less = {name: x for name, x in tensors.items() if name != GATE}
    more = tensors | {"model.layers.0.mlp.bias": torch.ones(8)}
    for given, wanted in (
        (less, ([GATE], [])),
        (more, ([], ["model.layers.0.mlp.bias"])),
    ):
        found, error = outcome(answer, small()[0], given)
        expect(
            error is None,
            f"it raised {type(error).__name__}: a name that only one side has "
            "belongs into a list",
        )
        found = tuple(map(list, found))
        expect(
            found != wanted[::-1],
            "the lists are exchanged: first what the model needs and the "
            "dictionary lacks",
        )
        expect(
            found == wanted,
            f"you report {found}, it must be {wanted}: ask in both directions",
        )
    for fault, tensor in (
        ("a shape [1, 8] for [8, 8]", torch.ones(1, 8)),
        ("bfloat16 for float32", torch.ones(8, 8).bfloat16()),
    ):
        model, tensors = small()
        _, error = outcome(answer, model, tensors | {GATE: tensor})
        expect(
            error is not None,
            f"{fault} is accepted: copy_ broadcasts and casts",
        )


def account(model, tensors):
    """The two lists of a right answer."""
    state = model.state_dict()
    lacking = [name for name in state if name not in tensors]
    return lacking, [name for name in tensors if name not in state]


@wrong("weights.load", "go by name, not by order")
def by_order(model, tensors):
    pairs = zip(model.state_dict().values(), tensors.values(), strict=False)
    for here, there in pairs:
        here.copy_(there)
    return account(model, tensors)


@wrong("weights.load", "the model is as it was")
def into_a_copy(model, tensors):
    state = model.state_dict()
    for name in state.keys() & tensors.keys():
        state[name] = tensors[name]
    return account(model, tensors)


@wrong("weights.load", "belongs into a list")
def only_what_fits(model, tensors):
    for name, here in model.state_dict().items():
        here.copy_(tensors[name])
    return account(model, tensors)


@wrong("weights.load", "the lists are exchanged")
def exchanged(model, tensors):
    state = model.state_dict()
    for name in state.keys() & tensors.keys():
        state[name].copy_(tensors[name])
    return account(model, tensors)[::-1]


@wrong("weights.load", "ask in both directions")
def one_direction(model, tensors):
    state = model.state_dict()
    for name in state.keys() & tensors.keys():
        state[name].copy_(tensors[name])
    return [], account(model, tensors)[1]


@wrong("weights.load", "copy_ broadcasts and casts")
def any_shape(model, tensors):
    state = model.state_dict()
    for name in state.keys() & tensors.keys():
        state[name].copy_(tensors[name])
    return account(model, tensors)


@wrong("weights.load", "bfloat16 for float32 is accepted")
def any_dtype(model, tensors):
    state = model.state_dict()
    for name in state.keys() & tensors.keys():
        if state[name].shape != tensors[name].shape:
            raise ValueError(name)
        state[name].copy_(tensors[name])
    return account(model, tensors)


@exercise("weights.error")
def check_error(answer):
    """The relative error of the worst token."""
    reference = torch.ones(100, 4)
    reference[0] *= 1000  # the first token is long
    reference[7] = 2.0
    h = reference.clone()
    h[7, 0] += 2  # one coordinate of one token
    found = float(answer(h, reference))
    distance, length = (h - reference).norm(dim=-1), reference.norm(dim=-1)
    for value, hint in (
        (
            (h - reference).norm() / reference.norm(),
            "one norm over all tokens: the long first token hides the wrong "
            "one",
        ),
        (
            (distance / length).mean(),
            "a mean over tokens hides one wrong token among a hundred",
        ),
        (distance.max(), "divide by the length of the reference"),
        (
            ((h - reference) / reference).abs().max(),
            "that is the worst single coordinate: take the length of a "
            "token's difference over the length of the reference",
        ),
        (
            (distance / h.norm(dim=-1)).max(),
            "divide by the reference, not by the vector that is tested",
        ),
        (
            ((h - reference).norm(dim=0) / reference.norm(dim=0)).max(),
            "you take the norm over the tokens: dim=-1 is a token's own",
        ),
    ):
        expect(abs(found - value) > 1e-6, hint)
    expect_close(
        found, 0.5, "one token is off by half its length: the error is 0.5"
    )


@wrong("weights.error", "worst single coordinate")
def elementwise(h, reference):
    return ((h - reference) / reference).abs().max().item()


@wrong("weights.error", "the norm over the tokens")
def wrong_axis(h, reference):
    each = (h - reference).norm(dim=0) / reference.norm(dim=0)
    return each.max().item()


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
