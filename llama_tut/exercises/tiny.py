"""Checkers of chapter 1."""

import torch
from torch.nn import functional as F

from llama_tut.exercises import exercise, expect, expect_close, wrong


@exercise("tiny.loss")
def check_loss(answer):
    """The next-token loss from logits and ids, shift and mean included."""
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 5, 7) * 2, torch.randint(7, (3, 5))
    log_p = logits.log_softmax(-1)

    def mean(rows, targets):
        return -log_p[:, rows].gather(2, ids[:, targets, None]).mean()

    right = mean(slice(0, 4), slice(1, 5))
    found = torch.as_tensor(answer(logits, ids)).double()
    expect(
        found.shape == (),
        f"the loss is one number, yours has shape {list(found.shape)}: take "
        "the mean over all rows and positions",
    )

    def is_not(value, hint):
        expect(abs(found.item() - float(value)) > 1e-4, hint)

    is_not(
        mean(slice(0, 5), slice(0, 5)),
        "you compare each position with the token it has just read: its "
        "target is the next one, ids[:, 1:]",
    )
    is_not(
        mean(slice(1, 5), slice(0, 4)),
        "you shift the wrong way: position t predicts token t + 1, not t - 1",
    )
    is_not(
        F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()),
        "your last position gets the first token of its row as a target: it "
        "has no target, leave it out",
    )
    is_not(-right, "the sign is wrong: the loss is the mean of -ln p")
    is_not(right * 12, "you sum over positions: take the mean")
    is_not(right * 4, "you sum over time: take the mean over all positions")
    is_not(right * 3, "you sum over rows: take the mean over all positions")
    is_not(right / 0.6931472, "use the natural logarithm, not that of base 2")
    taken = log_p[:, :-1].exp().gather(2, ids[:, 1:, None])
    is_not(
        -taken.mean(), "that is the mean probability: the logarithm is missing"
    )
    is_not(
        -taken.mean().log(),
        "take the logarithm of each probability first, and the mean then",
    )
    is_not(
        -logits[:, :-1].gather(2, ids[:, 1:, None]).mean(),
        "these are logits, not logarithms of probabilities: the softmax is "
        "missing",
    )
    expect_close(
        found,
        right.double(),
        "it is not the mean of -ln p(next token) over all rows and the first "
        "T - 1 positions; is the softmax over the last axis, the vocabulary?",
    )


@wrong("tiny.loss", "it has just read")
def unshifted(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


@wrong("tiny.loss", "the wrong way")
def shifted_back(logits, ids):
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten())


@wrong("tiny.loss", "has no target, leave it out")
def rolled(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())


@wrong("tiny.loss", "take the mean")
def summed(logits, ids):
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(2, ids[:, 1:, None]).sum()


@wrong("tiny.loss", "sum over time")
def summed_over_time(logits, ids):
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(2, ids[:, 1:, None]).sum(1).mean()


@wrong("tiny.loss", "the sign is wrong")
def positive(logits, ids):
    log_p = logits[:, :-1].log_softmax(-1)
    return log_p.gather(2, ids[:, 1:, None]).mean()


@wrong("tiny.loss", "the logarithm of each probability first")
def log_of_mean(logits, ids):
    p = logits[:, :-1].softmax(-1)
    return -p.gather(2, ids[:, 1:, None]).mean().log()


@wrong("tiny.loss", "the softmax is missing")
def no_softmax(logits, ids):
    return -logits[:, :-1].gather(2, ids[:, 1:, None]).mean()


@wrong("tiny.loss", "over the last axis")
def softmax_over_time(logits, ids):
    log_p = logits[:, :-1].log_softmax(1)
    return -log_p.gather(2, ids[:, 1:, None]).mean()


@wrong("tiny.loss", "one number")
def one_a_position(logits, ids):
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(2, ids[:, 1:, None]).squeeze(2)


@wrong("tiny.loss", "it raised RuntimeError")
def targets_shifted_only(logits, ids):
    return -logits.log_softmax(-1).flatten(0, 1)[ids[:, 1:]].sum(2) @ ids


def counting_model(ids):
    """Logits [B, T, 11] that are certain: the next token is a sum of all read.

    The last position depends on how many tokens were given, and on each.
    """
    expect(ids.dim() == 2, f"the model reads ids [B, T], not {ids.dim()}-D")
    place = torch.arange(1, ids.shape[1] + 1)
    return 60.0 * F.one_hot((ids * place).cumsum(1) % 11, 11) - 30.0


def continued(ids, length, context):
    """What `counting_model` must write."""
    for _ in range(length):
        best = counting_model(ids[:, -context:])[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids


@exercise("tiny.write")
def check_write(answer):
    """The loop that writes: read, draw, append."""
    torch.manual_seed(0)
    start = torch.tensor([[3, 1, 4]])
    found = answer(counting_model, start, 5, 100)
    expect(
        isinstance(found, torch.Tensor) and not found.is_floating_point(),
        "return a tensor of ids, whole numbers",
    )
    expect(
        found.shape != (1, 5) or found[0, :3].tolist() == [3, 1, 4],
        "return the old ids too, followed by the new ones",
    )
    expect(
        found.shape == (1, 8),
        f"3 ids continued by 5 must have shape [1, 8], yours has "
        f"{list(found.shape)}",
    )
    expect(found[0, :3].tolist() == [3, 1, 4], "the given ids must stay")
    wanted = continued(start, 5, 100)
    logits = counting_model(start)
    expect(
        found[0, 3] != logits[0, 0].argmax() or found[0, 3] == wanted[0, 3],
        "you draw from the first position: the next token is predicted at "
        "the last one, [:, -1]",
    )
    expect(
        found[0, 3] == wanted[0, 3],
        "the first new token does not come from the last position",
    )
    expect(
        torch.equal(found, wanted),
        "the first new token is right and later ones are not: every step "
        "must read all ids so far, the new ones included",
    )
    expect(
        torch.equal(
            answer(counting_model, start, 6, 4), continued(start, 6, 4)
        ),
        "the model may read the last `context` ids only: ids[:, -context:]",
    )

    def coin(ids):
        """The next token is 1 or 2, with probabilities 1/4 and 3/4."""
        logits = torch.tensor([0.0, 0.25, 0.75]).log()
        return logits.expand(*ids.shape, 3)

    drawn = answer(coin, torch.tensor([[0]]), 400, 4)[0, 1:]
    share = (drawn == 1).float().mean().item()
    expect(
        share > 0,
        "you take the most probable token: draw one, with torch.multinomial",
    )
    expect(
        abs(share - 0.25) < 0.1,
        f"a token of probability 0.25 came in {share:.0%} of the draws: draw "
        "from the softmax of the logits",
    )


@wrong("tiny.write", "you take the most probable token")
def greedy(model, ids, length, context):
    for _ in range(length):
        best = model(ids[:, -context:])[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids


@wrong("tiny.write", "from the first position")
def first_position(model, ids, length, context):
    for _ in range(length):
        p = model(ids[:, -context:])[:, 0].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids


@wrong("tiny.write", "the last `context` ids only")
def everything_read(model, ids, length, context):
    for _ in range(length):
        p = model(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids


@wrong("tiny.write", "the last `context` ids only")
def first_ids(model, ids, length, context):
    for _ in range(length):
        p = model(ids[:, :context])[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids


@wrong("tiny.write", "the new ones included")
def never_appended(model, ids, length, context):
    p = model(ids[:, -context:])[:, -1].softmax(-1)
    return torch.cat(
        [ids, *(torch.multinomial(p, 1) for _ in range(length))], 1
    )


@wrong("tiny.write", "return the old ids too")
def only_new(model, ids, length, context):
    start = ids.shape[1]
    for _ in range(length):
        p = model(ids[:, -context:])[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids[:, start:]


@wrong("tiny.write", "draw from the softmax")
def uniform_over_possible(model, ids, length, context):
    for _ in range(length):
        p = model(ids[:, -context:])[:, -1].softmax(-1)
        p = (p > 1e-6).float()
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids


@wrong("tiny.write", "it raised RuntimeError")
def draws_from_logits(model, ids, length, context):
    for _ in range(length):
        drawn = torch.multinomial(model(ids[:, -context:])[:, -1], 1)
        ids = torch.cat([ids, drawn], dim=1)
    return ids


@exercise("tiny.bigram")
def check_bigram(answer):
    """A table of what follows what, with one added to every count."""
    ids = torch.tensor([0, 1, 2, 1, 2, 2, 0, 1])
    counts = torch.zeros(4, 4)
    for a, b in zip(ids[:-1], ids[1:], strict=True):
        counts[a, b] += 1
    wanted = (counts + 1) / (counts + 1).sum(1, keepdim=True)
    found = torch.as_tensor(answer(ids, 4)).float()
    expect(
        found.shape == (4, 4),
        f"the table has shape [V, V], yours {list(found.shape)}: tokens that "
        "never occur have a row and a column too",
    )

    def is_not(table, hint):
        expect(
            not torch.allclose(found, table, atol=1e-4, equal_nan=True), hint
        )

    expect(
        not found.isnan().any() and (found > 0).all(),
        "some probabilities are 0 or undefined: add 1 to every count",
    )
    is_not(counts + 1, "these are counts: divide each row by its sum")
    is_not(
        (counts + 1) / (counts + 1).sum(0, keepdim=True),
        "your columns sum to 1: divide each row by its sum",
    )
    is_not(
        (counts + 1) / (counts + 1).sum(),
        "the whole table sums to 1: each row must, it is a distribution of "
        "its own",
    )
    is_not(
        (counts.T + 1) / (counts.T + 1).sum(1, keepdim=True),
        "rows and columns are exchanged: row a holds what follows a",
    )
    is_not(
        counts / counts.sum(1, keepdim=True).clamp(min=1) + 1,
        "add 1 to the counts, before you divide",
    )
    expect_close(
        found,
        wanted,
        "row a, column b must be (count of a followed by b, plus 1) divided "
        "by the sum of its row; do you count every pair of neighbours once?",
    )


def table_of(ids, V):
    return torch.bincount(ids[:-1] * V + ids[1:], minlength=V * V).view(V, V)


@wrong("tiny.bigram", "rows and columns are exchanged")
def transposed(ids, V):
    counts = table_of(ids, V).T + 1
    return counts / counts.sum(1, keepdim=True)


@wrong("tiny.bigram", "your columns sum to 1")
def by_column(ids, V):
    counts = table_of(ids, V) + 1
    return counts / counts.sum(0)


@wrong("tiny.bigram", "the whole table sums to 1")
def joint(ids, V):
    counts = table_of(ids, V) + 1
    return counts / counts.sum()


@wrong("tiny.bigram", "add 1 to every count")
def unsmoothed(ids, V):
    counts = table_of(ids, V)
    return counts / counts.sum(1, keepdim=True)


@wrong("tiny.bigram", "every pair of neighbours once")
def every_second_pair(ids, V):
    pairs = ids[:-1:2] * V + ids[1::2]
    counts = torch.bincount(pairs, minlength=V * V).view(V, V) + 1
    return counts / counts.sum(1, keepdim=True)


@wrong("tiny.bigram", "yours [3, 3]")
def sized_by_what_occurs(ids, V):
    V = int(ids.max()) + 1
    counts = table_of(ids, V) + 1
    return counts / counts.sum(1, keepdim=True)


@wrong("tiny.bigram", "it raised RuntimeError")
def forgot_minlength(ids, V):
    counts = torch.bincount(ids[:-1] * V + ids[1:]).view(V, V) + 1
    return counts / counts.sum(1, keepdim=True)
