"""Compilation: torch.compile where it works, and one line where it does not.

And the pass that tries a model before the first step.
"""

import torch

from llama_tut.tools.files import first_line
from llama_tut.tools.ranks import gather_objects


def try_one_pass(model, batch, autocast, call=None):
    """Forward and backward on one micro batch, which leaves no trace.

    Args:
        batch: what the model is called with, then the targets.
        autocast: called for the context of the forward pass.
        call: what to call in place of the model, such as its compiled form.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    # Not `call or model`: a compiled module has no truth value.
    call = model if call is None else call
    *inputs, targets = batch
    try:
        with autocast():
            loss = call(*inputs, targets=targets)
        loss.backward()
    finally:
        model.zero_grad()
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def compile_model(model, batch, ranks, autocast, say):
    """The model compiled, or itself after one line that says why not.

    It is tried on one micro batch, forward and backward. When one rank fails,
    none compiles: the others would wait for it in every step.

    Args:
        batch, autocast: as in `try_one_pass`.
        say: called with the line.
    """
    fast, problem = torch.compile(model), None
    try:
        try_one_pass(model, batch, autocast, call=fast)
    except Exception as error:  # whatever the compiler's tools raise
        problem = first_line(error)
    problems = list(filter(None, gather_objects(problem, ranks.gloo_group)))
    if not problems:
        return fast
    say(f"not compiled, going on without: {problems[0]}")
    return model
