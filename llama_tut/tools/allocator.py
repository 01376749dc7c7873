"""Allocator: how many bytes PyTorch has really allocated on the CPU."""

import os
from contextlib import contextmanager

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports on stderr

from torch.profiler import ProfilerActivity, profile  # noqa: E402


@contextmanager
def bytes_alive():
    """Record every allocation inside; afterwards the list holds their sums.

    Yields:
        A list. When the block ends, it gets the number of bytes that were
        allocated since its beginning and not freed, after each allocation
        and each release.
    """
    history = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        yield history
    events = [
        event
        for event in p.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        history.append(total)
