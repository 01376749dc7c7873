"""Checkers of chapter 25."""

from llama_tut.exercises import exercise, expect, expect_close, wrong

NAMES = ("parameters", "gradients", "optimizer", "gathered")


@exercise("plan.bytes")
def check_bytes(answer):
    """The bytes of a rank by purpose."""
    found = answer(10, 800, 2_000, 8, 1)
    expect(
        isinstance(found, dict) and set(found) == set(NAMES),
        f"return a dictionary with the keys {', '.join(NAMES)}",
    )
    expect(
        found["optimizer"] != found["parameters"],
        "AdamW keeps two averages for each parameter, in float32 both",
    )
    expect(
        found["gathered"] != 2 * (10 * 800 + 2_000),
        "FSDP never gathers the whole model: one layer at a time, and the "
        "root",
    )
    expect(
        found["gathered"] != 2 * 800,
        "the root stays gathered while a layer computes: add it",
    )
    expect(
        found["gathered"] != 4 * 2_800,
        "weights are gathered in bfloat16, 2 bytes each",
    )
    expect(
        found["gathered"] != 2 * 2_800 / 8,
        "what is gathered is whole again: FSDP's ranks do not share it",
    )
    cut = answer(10, 800, 2_000, 8, 2)
    expect(
        cut["parameters"] != 4 * 10_000 / 4,
        "tensor parallel's ranks share the state too: it is spread over all "
        "gpus",
    )
    expect(
        cut["parameters"] != 4 * 10_000 / 16,
        "gpus counts all ranks already: do not divide by tensor_parallel "
        "again",
    )
    expect(
        cut["gathered"] != 2 * 2_800,
        "a gathered matrix is still cut by tensor parallel",
    )
    for given in ((10, 800, 2_000, 8, 1), (10, 800, 2_000, 8, 2)):
        layers, layer, root, gpus, tp = given
        own = (layers * layer + root) / gpus
        wanted = 4 * own, 4 * own, 8 * own, 2 * (layer + root) / tp
        found = answer(*given)
        for name, number in zip(NAMES, wanted, strict=True):
            expect_close(
                found[name],
                float(number),
                f"{name}: {found[name]:,.0f} bytes, not {number:,.0f}, for "
                f"{layers} layers of {layer}, a root of {root:,}, {gpus} "
                f"gpus and tensor_parallel {tp}",
            )


def envelope(layers, layer, root, gpus, tp, **changed):
    own = (layers * layer + root) / gpus
    right = {
        "parameters": 4 * own,
        "gradients": 4 * own,
        "optimizer": 8 * own,
        "gathered": 2 * (layer + root) / tp,
    }
    return right | changed


@wrong("plan.bytes", "two averages")
def one_average(layers, layer, root, gpus, tp):
    own = (layers * layer + root) / gpus
    return envelope(layers, layer, root, gpus, tp, optimizer=4 * own)


@wrong("plan.bytes", "never gathers the whole model")
def all_gathered(layers, layer, root, gpus, tp):
    whole = 2 * (layers * layer + root) / tp
    return envelope(layers, layer, root, gpus, tp, gathered=whole)


@wrong("plan.bytes", "the root stays gathered")
def without_root(layers, layer, root, gpus, tp):
    return envelope(layers, layer, root, gpus, tp, gathered=2 * layer / tp)


@wrong("plan.bytes", "what is gathered is whole again")
def gathered_over_all(layers, layer, root, gpus, tp):
    pieces = 2 * (layer + root) / gpus
    return envelope(layers, layer, root, gpus, tp, gathered=pieces)


@wrong("plan.bytes", "share the state too")
def only_data_ranks(layers, layer, root, gpus, tp):
    right = envelope(layers, layer, root, gpus // tp, tp)
    return right | {"gathered": 2 * (layer + root) / tp}


@wrong("plan.bytes", "do not divide by tensor_parallel again")
def divided_twice(layers, layer, root, gpus, tp):
    return envelope(layers, layer, root, gpus * tp, tp)


@wrong("plan.bytes", "still cut by tensor parallel")
def gathered_uncut(layers, layer, root, gpus, tp):
    whole = 2 * (layer + root)
    return envelope(layers, layer, root, gpus, tp, gathered=whole)


@wrong("plan.bytes", "bytes, not")
def whole_division(layers, layer, root, gpus, tp):
    own = (layers * layer) // gpus + root
    return envelope(
        layers, layer, root, gpus, tp, parameters=4 * own, gradients=4 * own
    )


@exercise("plan.roofline")
def check_roofline(answer):
    """Seconds of a step."""
    operations = [(100.0, 1.0), (0.0, 6.0), (20.0, 4.0)]  # 10, 3 and 2 s
    given = {"peak": 10.0, "bandwidth": 2.0}
    found = answer(operations, 0.0, 0.0, **given)
    expect(
        abs(found - 12) > 1e-6,
        "take the longer of the two for each operation, then add: an "
        "operation cannot use what another one leaves",
    )
    expect(
        abs(found - 17.5) > 1e-6,
        "an operation reads while it computes: the longer of the two, not "
        "their sum",
    )
    expect_close(found, 15.0, "10 + 3 + 2 seconds make 15, without messages")
    found = answer(operations, 4.0, 1.0, **given)
    expect(
        abs(found - 20) > 1e-6,
        "FSDP's messages are hidden as long as they are shorter",
    )
    expect(
        abs(found - 15) > 1e-6,
        "tensor parallel's messages are waited for: they add",
    )
    expect_close(found, 19.0, "15 seconds of work and 4 of waiting make 19")
    found = answer(operations, 4.0, 17.0, **given)
    expect(
        abs(found - 21) > 1e-6,
        "FSDP's messages go on while the GPU waits for tensor parallel's",
    )
    expect_close(found, 19.0, "17 seconds of FSDP's messages hide in 19")
    found = answer(operations, 4.0, 30.0, **given)
    expect_close(found, 30.0, "if FSDP's messages are longer, they decide")


@wrong("plan.roofline", "then add")
def of_the_sums(operations, waited, hidden, peak, bandwidth):
    flops = sum(f for f, _ in operations) / peak
    moved = sum(b for _, b in operations) / bandwidth
    return max(max(flops, moved) + waited, hidden)


@wrong("plan.roofline", "not their sum")
def one_after_the_other(operations, waited, hidden, peak, bandwidth):
    busy = sum(f / peak + b / bandwidth for f, b in operations)
    return max(busy + waited, hidden)


@wrong("plan.roofline", "are hidden as long as")
def nothing_hidden(operations, waited, hidden, peak, bandwidth):
    busy = sum(max(f / peak, b / bandwidth) for f, b in operations)
    return busy + waited + hidden


@wrong("plan.roofline", "they add")
def everything_hidden(operations, waited, hidden, peak, bandwidth):
    busy = sum(max(f / peak, b / bandwidth) for f, b in operations)
    return max(busy, waited, hidden)


@wrong("plan.roofline", "waits for tensor parallel's")
def hidden_in_work_only(operations, waited, hidden, peak, bandwidth):
    busy = sum(max(f / peak, b / bandwidth) for f, b in operations)
    return max(busy, hidden) + waited


@exercise("plan.tokens")
def check_tokens(answer):
    """Tokens from which arithmetic hides FSDP's messages."""
    found = answer(600.0, 2.0, False)
    expect(
        abs(found - 300) > 1e-6,
        "add the scattered gradients: 4 bytes each, and both gathers",
    )
    expect(
        abs(found - 200) > 1e-6,
        "weights are gathered twice, forward and backward",
    )
    expect(
        abs(found - 1200) > 1e-6,
        "backward is arithmetic too: 6 FLOPs for each parameter and token",
    )
    expect(
        abs(found * 400 - 1) > 1e-6 and abs(found - 1 / 400) > 1e-6,
        "the other way round: more tokens mean more arithmetic",
    )
    expect_close(found, 400.0, "set 6 N t / peak = 8 N / speed")
    found = answer(600.0, 2.0, True)
    expect(
        abs(found - 400 * 8 / 6) > 1e-6,
        "recomputing makes the arithmetic longer, so fewer tokens will do",
    )
    expect(
        abs(found - 400) > 1e-6,
        "recomputing adds one forward pass: 8 FLOPs in place of 6",
    )
    expect_close(found, 300.0, "8 N t / peak = 8 N / speed")


@wrong("plan.tokens", "scattered gradients")
def one_gather_and_scatter(peak, speed, recompute):
    return 6 / speed * peak / (8 if recompute else 6)


@wrong("plan.tokens", "gathered twice")
def only_gathers(peak, speed, recompute):
    return 4 / speed * peak / (8 if recompute else 6)


@wrong("plan.tokens", "backward is arithmetic too")
def forward_only(peak, speed, recompute):
    return 8 / speed * peak / (4 if recompute else 2)


@wrong("plan.tokens", "fewer tokens will do")
def recompute_upside_down(peak, speed, recompute):
    return 8 / speed * peak / 6 * (8 / 6 if recompute else 1)


@wrong("plan.tokens", "8 FLOPs in place of 6")
def recompute_forgotten(peak, speed, recompute):
    return 8 / speed * peak / 6
