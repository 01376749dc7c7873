"""Run a function of a notebook on several ranks, as torchrun would.

A notebook is one process. Here its function goes into a script, together with
what it names, and each rank runs that script in a process of its own.
"""

import ast
import dis
import inspect
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch


def on_ranks(world_size, function):
    """What `function()` returns on each of `world_size` processes, as a list.

    The function may name modules, functions and classes, imported or written
    beside it at the top level, and constants whose `repr` is Python. A result is saved with
    torch.save and loaded as weights: tensors, numbers, text, and lists,
    tuples and dictionaries of these.

    Raises:
        RuntimeError: a rank has failed; its own words are on stderr.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= {"WORLD_SIZE": str(world_size)}
    group |= {"LOCAL_WORLD_SIZE": str(world_size)}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(script_of(function))
        context = multiprocessing.get_context(METHOD)
        ranks = []
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            result = f"{folder}/{rank}"
            ranks.append(
                context.Process(
                    target=run_script,
                    args=(script, result, {**os.environ, **group, **own}),
                )
            )
        with no_main_module():
            for process in ranks:
                process.start()
        for process in ranks:
            process.join()
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise RuntimeError(f"the ranks ended with the codes {codes}")
        return [torch.load(f"{folder}/{rank}") for rank in range(world_size)]


# A server imports PyTorch once, and forks each rank from itself. A process
# that has run PyTorch must not be forked: its threads would be missing.
METHOD = "spawn"
if "forkserver" in multiprocessing.get_all_start_methods():
    METHOD = "forkserver"
    multiprocessing.set_forkserver_preload(
        [
            "torch.distributed.fsdp",
            "torch.distributed.tensor.parallel",
            "torch.distributed.checkpoint.state_dict",
            "torch._dynamo",  # every optimizer imports it
        ]
    )


@contextmanager
def no_main_module():
    """New processes shall not import the script that starts them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def run_script(script, result, environment):
    """Be one rank: run the script with this environment."""
    os.environ.update(environment)
    sys.argv = [str(script), result]
    runpy.run_path(str(script), run_name="__main__")


def script_of(function):
    """The text of a script that runs `function` and saves what it returns."""
    lines = {}
    add_source(function, lines)
    save = f"torch.save({function.__name__}(), sys.argv[1])"
    return "\n".join(["import sys, torch", *lines.values(), save])


def add_source(value, lines):
    """Add the source of a function or class, after all that it names."""
    lines[value.__name__] = None  # it may name itself
    source = source_of(value)
    beside = vars(sys.modules[value.__module__])
    for name in global_names(compile(source, "a cell", "exec")):
        if name not in lines and name in beside:
            add_global(name, beside[name], value.__module__, lines)
    del lines[value.__name__]
    lines[value.__name__] = source


def source_of(value):
    """The source of a function or class, in a notebook too.

    Before Python 3.13, `inspect` finds no class of a notebook, but it does
    find the cell that holds a class's methods.
    """
    if not inspect.isclass(value):
        return inspect.getsource(value)
    methods = [getattr(v, "__func__", v) for v in vars(value).values()]
    own = f"{value.__qualname__}."  # others may be borrowed from elsewhere
    method = next(
        m
        for m in methods
        if inspect.isfunction(m) and m.__qualname__.startswith(own)
    )
    text = "".join(inspect.findsource(method)[0])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == value.__name__:
            return ast.get_source_segment(text, node)
    raise OSError(f"the source of {value.__name__} is not found")


def global_names(compiled):
    """The names that compiled code looks up outside its functions."""
    for step in dis.get_instructions(compiled):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for part in compiled.co_consts:
        if inspect.iscode(part):  # the body of a function or class
            yield from global_names(part)


def add_global(name, value, here, lines):
    """Add what makes the global `name` of the module `here`."""
    if isinstance(value, ModuleType):
        lines[name] = f"import {value.__name__} as {name}"
    elif not hasattr(value, "__name__"):
        lines[name] = f"{name} = {value!r}"
    elif value.__module__ == here:
        add_source(value, lines)
    else:
        lines[name] = f"from {value.__module__} import {value.__name__}"
        lines[name] += f" as {name}"
