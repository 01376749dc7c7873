"""torchrun, with the workers' exit code and without its own reports.

torchrun turns every failure into a traceback and exit code 1, and forwards a
signal by failing. Here bad input (2) stays 2, and SIGTERM or Ctrl-C goes to
the workers, which save, end with 0, and so end the job with 0.
"""

import logging
import os
import signal
import sys

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

signals = []


def forward(number, frame):
    """Pass a signal on to the workers; without any there is nothing to save."""
    signals.append(number)
    workers = psutil.Process().children()
    if not workers:
        os._exit(128 + number)
    for worker in workers:
        worker.send_signal(number)


def exit_code(failures):
    """The job's exit code, with a line for what no worker has reported."""
    codes = {failure.exitcode for failure in failures.values()}
    if 2 in codes:
        return 2
    if signals and codes <= {-number for number in signals}:
        return 128 + signals[0]  # the workers had not begun
    first = min(failures, key=lambda rank: failures[rank].timestamp)
    code = failures[first].exitcode
    ended = f"was killed by signal {-code}" if code < 0 else f"failed ({code})"
    print(
        f"error: rank {first} {ended}, so the job was stopped: go on from the "
        "newest checkpoint with --resume",
        file=sys.stderr,
    )
    return 1


def main():
    logging.disable(logging.ERROR)  # the workers have said it already
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    ours = ["--signals-to-handle=SIGUSR2", "--shutdown-timeout=10"]
    try:
        run.run(run.parse_args([*ours, *sys.argv[1:]]))
    except ChildFailedError as error:
        sys.exit(exit_code(error.failures))
    except RendezvousError as error:
        print(
            f"error: no contact between the machines: {error}", file=sys.stderr
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
