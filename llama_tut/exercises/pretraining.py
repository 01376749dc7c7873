"""Checkers of chapter 18."""

from llama_tut.exercises import exercise, expect, wrong


def played(answer, steps=7, eval_every=2, save_every=3, stop_at=None):
    """What an answer does in a run of `steps`: its events, and its result."""
    events = []

    def lines():
        for step in range(1, steps + 1):
            events.append(f"step {step}")
            yield {"step": step}

    def measure():
        events.append("measure")
        return {"val_loss": 1.0}

    def write(line):
        value = " with val_loss" if "val_loss" in line else ""
        events.append(f"write {line['step']}{value}")

    ended = answer(
        lines(), steps, eval_every, save_every, measure, write,
        lambda step: events.append(f"save {step}"),
        lambda: stop_at is not None and f"step {stop_at}" in events,
    )  # fmt: skip
    return events, ended


@exercise("pretraining.loop")
def check_loop(answer):
    """Measure, write, save, stop: in this order."""
    events, ended = played(answer)
    written = [event for event in events if event.startswith("write")]
    expect(len(written) == 7, f"{len(written)} lines written for 7 steps")
    for step in (2, 4, 6):
        expect(
            f"write {step} with val_loss" in written,
            f"the line of step {step} lacks what was measured: measure "
            "before you write",
        )
    expect("write 7 with val_loss" in written, "the last step is measured too")
    expect(events.count("measure") == 4, "measured when it was not due")
    saved = [event for event in events if event.startswith("save")]
    expect("save 7" in saved, "the last step is saved too")
    expect(saved == ["save 3", "save 6", "save 7"], f"saved: {saved}")
    first = events.index("write 3"), events.index("save 3")
    expect(first[0] < first[1], "a checkpoint claims step 3, whose line is "
           "not written yet: write before you save")  # fmt: skip
    expect(ended is True, "return True when the end was reached")
    events, ended = played(answer, eval_every=0, save_every=0)
    expect(
        events[-3:] == ["measure", "write 7 with val_loss", "save 7"],
        f"with 0, the end is still measured and saved, not {events[-3:]}",
    )
    events, ended = played(answer, stop_at=5)
    expect("save 5" in events, "asked to stop after step 5: save it first")
    expect("step 6" not in events, "asked to stop after step 5, it goes on")
    expect(ended is False, "stopped before the end: return False")
    _, ended = played(answer, stop_at=7)
    expect(ended is True, "asked to stop at the last step: the end is reached")


def variation(due_at_end=True, order="measure write save", stop_saves=True):
    """A loop of a run with one thing that can be wrong."""

    def loop(lines, steps, eval_every, save_every, measure, write, save, stop):
        for line in lines:
            step, stopping = line["step"], stop()
            last = due_at_end and step == steps
            measuring = last or (eval_every and step % eval_every == 0)
            saving = last or (save_every and step % save_every == 0)
            saving = saving or (stop_saves and stopping)
            for what in order.split():
                if what == "measure" and measuring:
                    line |= measure()
                if what == "write":
                    write(line)
                if what == "save" and saving:
                    save(step)
            if stopping and step != steps:
                return False
        return True

    return loop


wrong("pretraining.loop", "last step is measured")(variation(due_at_end=False))
wrong("pretraining.loop", "before you write")(
    variation(order="write measure save")
)
wrong("pretraining.loop", "write before you save")(
    variation(order="measure save write")
)
wrong("pretraining.loop", "save it first")(variation(stop_saves=False))


@wrong("pretraining.loop", "by zero")
def divides_by_zero(
    lines, steps, eval_every, save_every, measure, write, save, stop
):
    for line in lines:
        last = line["step"] == steps
        if last or line["step"] % eval_every == 0:
            line |= measure()
        write(line)
        if last or stop() or line["step"] % save_every == 0:
            save(line["step"])
        if stop() and not last:
            return False
    return True


@wrong("pretraining.loop", "the end is reached")
def gives_up_at_the_end(
    lines, steps, eval_every, save_every, measure, write, save, stop
):
    for line in lines:
        last, stopping = line["step"] == steps, stop()
        if last or (eval_every and line["step"] % eval_every == 0):
            line |= measure()
        write(line)
        if last or stopping or (save_every and line["step"] % save_every == 0):
            save(line["step"])
        if stopping:
            return False
    return True


@exercise("pretraining.plan")
def check_plan(answer):
    """Bytes of N parameters, and the largest N that fits."""
    found = answer(1000, 16_000, False)
    expect(
        isinstance(found, tuple | list) and len(found) == 2,
        "return two numbers: the bytes of N, and the largest N",
    )
    needed, largest = found
    for value, hint in (
        (12_000, "AdamW has two averages, a mean of the gradient and a mean of "
         "its square: 8 bytes"),
        (8_000, "weights and gradients are half of it: the averages are "
         "missing"),
        (4_000, "this is the weight alone: gradient and averages are missing"),
        (10_000, "all four are float32: 4 bytes each, not 2"),
        (18_000, "without autocast there are no bfloat16 copies"),
    ):  # fmt: skip
        expect(needed != value, hint)
    expect(
        needed == 16_000, f"1,000 parameters take 16,000 bytes, not {needed}"
    )
    half, most = answer(1000, 100_000, True)
    expect(half != 16_000, "with autocast there is a bfloat16 copy of each")
    expect(half != 20_000, "the copy is bfloat16: 2 bytes")
    expect(half != 12_000 and half != 10_000, "the float32 weights stay")
    expect(half == 18_000, f"with autocast it is 18,000 bytes, not {half}")
    expect(
        largest == 1000, f"16,000 bytes hold 1,000 parameters, not {largest}"
    )
    expect(most != 5556, "5,556 parameters do not fit: round down")
    expect(most == 5555, f"100,000 bytes hold 5,555 parameters, not {most}")


@wrong("pretraining.plan", "AdamW has two averages")
def one_average(N, room, half):
    each = 12 + 2 * half
    return each * N, room // each


@wrong("pretraining.plan", "gradient and averages")
def weights_only(N, room, half):
    return 4 * N, room // 4


@wrong("pretraining.plan", "the float32 weights stay")
def all_in_bfloat16(N, room, half):
    each = 10 if half else 16
    return each * N, room // each


@wrong("pretraining.plan", "the copy is bfloat16")
def copy_in_float32(N, room, half):
    each = 16 + 4 * half
    return each * N, room // each


@wrong("pretraining.plan", "round down")
def rounded_up(N, room, half):
    each = 16 + 2 * half
    return each * N, -(-room // each)


@exercise("pretraining.fit")
def check_fit(answer):
    """The largest micro batch that fits and can be shared out."""
    # 512 rows per step; 20 fit
    rows = dict(free=20_999, row=1000, tokens=512 * 64, T=64)
    found = answer(**rows, world_size=1)
    expect(found * 1000 <= 20_999, f"{found} rows do not fit")
    expect(found != 20, "20 rows fit, but 512 are no multiple of 20")
    expect(found == 16, f"{found}: of 512 rows, 16 at once fit")
    found = answer(**{**rows, "tokens": 96 * 64}, world_size=8)
    expect(found != 16, "96 rows on 8 ranks are 12 a rank: ask for all ranks")
    expect(
        found not in (4, 8),
        "powers of two are not all: 12 rows per rank fit at once",
    )
    expect(found == 12, f"{found}: of 12 rows per rank, 12 at once fit")
    expect(answer(**rows, world_size=3) == 0, "512 rows on 3 ranks: no such B")
    expect(
        answer(999, 1000, 64, 64, 1) == 0, "when not one row fits, return 0"
    )


@wrong("pretraining.fit", "no multiple of 20")
def whatever_fits(free, row, tokens, T, world_size):
    return free // row


@wrong("pretraining.fit", "ask for all ranks")
def one_rank(free, row, tokens, T, world_size):
    fits = range(1, free // row + 1)
    return max((B for B in fits if tokens % (B * T) == 0), default=0)


@wrong("pretraining.fit", "powers of two")
def halving(free, row, tokens, T, world_size):
    B = 1 << (free // row).bit_length() >> 1
    while B and tokens % (B * T * world_size):
        B //= 2
    return B
