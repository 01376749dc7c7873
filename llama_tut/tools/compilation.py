"""Compilation: torch.compile where it works, and one line where it does not.

And the pass that tries a model before the first step.
"""

import torch
from torch import nn

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


class InParts(nn.Module):
    """Calls a model with its layers and its loss compiled, by themselves.

    All layers are alike, so one program serves them all: it is made sooner
    than one for the whole model, and what the model computes once, such as
    the rotary tables, is not computed again inside each layer. The model
    itself stays as it is: to evaluate or to write, call it directly.

    options: of torch.compile.
    """

    def __init__(self, model, **options):
        super().__init__()
        self._orig_mod = model  # the name that torch.compile's wrapper has
        modules = list(model.modules())
        lists = (m for m in modules if isinstance(m, nn.ModuleList))
        parts = [(layer, "forward") for layers in lists for layer in layers]
        parts += [
            (m, "compute_loss") for m in modules if hasattr(m, "compute_loss")
        ]
        self.programs = [
            (part, name, torch.compile(getattr(part, name), **options))
            for part, name in parts
        ]

    def forward(self, *args, **kwargs):
        """What the model returns."""
        kept = [vars(part).get(name) for part, name, _ in self.programs]
        for part, name, program in self.programs:
            vars(part)[name] = program
        try:
            return self._orig_mod(*args, **kwargs)
        finally:
            for (part, name, _), own in zip(self.programs, kept, strict=True):
                vars(part)[name] = own
                if own is None:  # it is the class's
                    del vars(part)[name]


def compile_model(model, batch, ranks, autocast, say):
    """The model `InParts`, or itself after one line that says why not.

    It is tried on one micro batch, forward and backward. Where parts fail, as
    they do when matrices are cut over ranks, the whole is tried. When one rank
    fails, none compiles: the others would wait for it in every step.

    Args:
        batch, autocast: as in `try_one_pass`.
        say: called with the line.
    """
    for compiled in InParts, torch.compile:
        fast, problem = compiled(model), None
        try:
            try_one_pass(model, batch, autocast, call=fast)
        except Exception as error:  # whatever the compiler's tools raise
            problem = first_line(error)
        problems = gather_objects(problem, ranks.gloo_group)
        problems = [problem for problem in problems if problem]
        if not problems:
            return fast
    say(f"not compiled, going on without: {problems[0]}")
    return model
