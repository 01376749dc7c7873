"""torchrun, with the workers' exit code and without its own reports.

torchrun turns every failure into a traceback and exit code 1, and forwards a
signal by failing. Here bad input (2) stays 2, and SIGTERM or Ctrl-C goes to
the workers, which save, end with 0, and so end the job with 0.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time

import psutil
from torch.distributed import DistNetworkError, DistStoreError, run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from llama_tut.tools.files import first_line

SILENCE_S = 10  # a wait that is longer is announced
signals = []


def say(line):
    """One line to stderr."""
    print(line, file=sys.stderr, flush=True)


def workers():
    """The processes that torchrun has started."""
    return psutil.Process().children()


def watch_signals():
    """Pass SIGTERM and Ctrl-C on to the workers.

    A handler of Python would not run while the main thread waits in C++ for
    another machine. So the handlers do nothing, and a thread reads the bytes
    that Python writes for each signal. Without workers there is nothing to
    save, and the job ends; so it does when Ctrl-C is pressed once more.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def forward():
        while True:
            number = reader.recv(1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            again = number == signal.SIGINT and number in signals
            signals.append(number)
            found = workers()
            for worker in found:
                worker.send_signal(signal.SIGKILL if again else number)
            if again or not found:
                os._exit(128 + number)

    # The thread holds the writer: a socket that nobody holds is closed.
    thread = threading.Thread(target=forward, daemon=True)
    thread.writer = writer
    thread.start()


def announce_wait(machines, where):
    """Say that other machines are waited for, if it takes long."""

    def watch():
        time.sleep(SILENCE_S)
        if not workers():
            others = f"{'up to ' * (machines > 2)}{machines - 1}"
            say(f"waiting for {others} of {machines} machines at {where}")

    if machines > 1:
        threading.Thread(target=watch, daemon=True).start()


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
    say(
        f"error: rank {first} {ended}, so the job was stopped: go on from the "
        "newest checkpoint with --resume"
    )
    return 1


def problem(args):
    """What torchrun's options get wrong, as one line; None when they fit."""
    ranks, machines = args.nproc_per_node, args.nnodes.split(":")[-1]
    if ranks not in ("auto", "cpu", "gpu") and not positive(ranks):
        return f"NPROC is {ranks}: take 1 or more ranks"
    if not positive(machines):
        return f"NNODES is {args.nnodes}: take the number of machines"
    if not 0 <= (args.node_rank or 0) < int(machines):
        last = int(machines) - 1
        return f"NODE_RANK is {args.node_rank}: machines are 0 to {last}"
    if not 0 <= (args.master_port or 0) < 2**16:
        return f"MASTER_PORT is {args.master_port}: take 1024 to 65535"
    return None


def positive(text):
    """Whether a text is a whole number from 1 on."""
    return text.isascii() and text.isdigit() and int(text) > 0


def main():
    """torchrun with these arguments; exits as the module says."""
    logging.disable(logging.ERROR)  # the workers have said it already
    ours = ["--signals-to-handle=SIGUSR2", "--shutdown-timeout=10"]
    args = run.parse_args([*ours, *sys.argv[1:]])
    if wrong := problem(args):
        say(f"error: {wrong}")
        sys.exit(2)
    where = f"{args.master_addr}:{args.master_port or 29500}"
    watch_signals()
    announce_wait(int(args.nnodes.split(":")[-1]), where)  # of 1:4, four
    try:
        run.run(args)
    except ChildFailedError as error:
        sys.exit(exit_code(error.failures))
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            say(
                f"error: port {args.master_port or 29500} of this machine is taken, "
                "perhaps by another job: choose another MASTER_PORT, the same "
                "on all machines"
            )
            sys.exit(2)
        reason = first_line(error)
        say(f"error: no contact between the machines at {where}: {reason}")
        sys.exit(1)


if __name__ == "__main__":
    main()
