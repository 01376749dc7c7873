"""Compilation: torch.compile where it works, and one line where it does not."""

import torch

from llama_tut.tools.files import first_line
from llama_tut.tools.ranks import gather_objects


def compile_model(model, ids, ranks, autocast, say):
    """The model compiled, or itself after one line that says why not.

    It is tried on one micro batch, forward and backward. When one rank fails,
    none compiles: the others would wait for it in every step.

    Args:
        ids: any micro batch, [B, T].
        autocast: called for the context of the forward pass.
        say: called with the line.
    """
    fast, problem = torch.compile(model), None
    try:
        with autocast():
            loss = fast(ids, targets=ids)
        loss.backward()
    except Exception as error:  # whatever the compiler's tools raise
        problem = first_line(error)
    model.zero_grad()
    problems = list(filter(None, gather_objects(problem, ranks.gloo_group)))
    if not problems:
        return fast
    say(f"not compiled, going on without: {problems[0]}")
    return model
