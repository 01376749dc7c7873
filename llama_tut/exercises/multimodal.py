"""Checkers of chapter 27."""

import math

import torch
from torch.nn import functional as F

from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.multimodal import patchify, pixel_shuffle


def some_pictures():
    """Three pictures of 6 x 8 pixels, and a layer for patches of 2 x 2."""
    torch.manual_seed(0)
    return torch.randn(3, 6, 8), torch.randn(5, 4), torch.randn(5)


@exercise("multimodal.patches")
def check_patches(answer):
    """Patches through a linear layer, by one strided convolution."""
    pictures, weight, bias = some_pictures()
    wanted = F.linear(patchify(pictures, 2), weight, bias)
    found = answer(pictures.clone(), weight, bias)
    cases = {
        channels_first: "the vectors must come last: [B, N, E], not [B, E, N]",
        column_by_column: "number the patches row by row",
        turned_kernel: "a row of the weight holds the pixels of a patch row "
        "by row: reshape it to [P, P], and do not transpose",
        without_bias: "the bias is missing",
        every_pixel: "patches do not overlap: the stride is P",
    }
    for case, hint in cases.items():
        there = case(pictures, weight, bias)
        same = torch.is_tensor(found) and found.shape == there.shape
        same = same and torch.allclose(found, there, atol=1e-5)
        expect(not same, hint)
    expect_close(
        found, wanted, "compare with F.linear(patchify(x, P), w, b)", 1e-4
    )


def convolved(pictures, weight, bias, stride=2):
    """[B, E, H / P, W / P]."""
    kernel = weight.reshape(len(weight), 1, 2, 2)
    return F.conv2d(pictures[:, None], kernel, bias, stride)


@wrong("multimodal.patches", "must come last")
def channels_first(pictures, weight, bias):
    return convolved(pictures, weight, bias).flatten(2)


@wrong("multimodal.patches", "row by row")
def column_by_column(pictures, weight, bias):
    return convolved(pictures, weight, bias).mT.flatten(2).mT


@wrong("multimodal.patches", "do not transpose")
def turned_kernel(pictures, weight, bias):
    kernel = weight.reshape(len(weight), 1, 2, 2).mT
    return F.conv2d(pictures[:, None], kernel, bias, 2).flatten(2).mT


@wrong("multimodal.patches", "bias is missing")
def without_bias(pictures, weight, bias):
    return convolved(pictures, weight, None).flatten(2).mT


@wrong("multimodal.patches", "do not overlap")
def every_pixel(pictures, weight, bias):
    return convolved(pictures, weight, bias, stride=1).flatten(2).mT


@wrong("multimodal.patches", "it must be [3, 12, 5]")
def grid_kept(pictures, weight, bias):
    return convolved(pictures, weight, bias).permute(0, 2, 3, 1)


@exercise("multimodal.pixel_shuffle")
def check_pixel_shuffle(answer):
    """Groups of 2 x 2 of a grid of 4 x 6, each with three numbers."""
    x = torch.arange(2 * 24 * 3).view(2, 24, 3)
    found = answer(x.clone(), 6, 2)
    cases = {
        in_a_line: "a group is a square of the picture: its second row of "
        "patches lies W / P places further on",
        columns_first: "inside a group, read row by row too",
        groups_by_column: "number the groups row by row",
        channels_apart: "keep the E numbers of a patch together",
    }
    for case, hint in cases.items():
        there = case(x, 6, 2)
        same = torch.is_tensor(found) and found.shape == there.shape
        expect(not (same and torch.equal(found, there)), hint)
    expect_close(found, pixel_shuffle(x, 6, 2), "the numbers only move")
    expect_close(
        answer(x.clone(), 6, 1), x, "with R = 1 nothing changes its place"
    )


def grouped(x, columns, R):
    """[B, rows / R, R, columns / R, R, E]."""
    B, N, E = x.shape
    return x.reshape(B, N // columns // R, R, columns // R, R, E)


def in_order(x, columns, R, *axes):
    """The groups, with these axes in this order, three of them joined."""
    x = grouped(x, columns, R).permute(0, *axes)
    return x.flatten(3).flatten(1, 2)


@wrong("multimodal.pixel_shuffle", "further on")
def in_a_line(x, columns, R):
    B, N, E = x.shape
    return x.reshape(B, N // R**2, R * R * E)


@wrong("multimodal.pixel_shuffle", "inside a group")
def columns_first(x, columns, R):
    return in_order(x, columns, R, 1, 3, 4, 2, 5)


@wrong("multimodal.pixel_shuffle", "number the groups")
def groups_by_column(x, columns, R):
    return in_order(x, columns, R, 3, 1, 2, 4, 5)


@wrong("multimodal.pixel_shuffle", "together")
def channels_apart(x, columns, R):
    return in_order(x, columns, R, 1, 3, 5, 2, 4)


@wrong("multimodal.pixel_shuffle", "it must be [2, 6, 12]")
def averaged(x, columns, R):
    return grouped(x, columns, R).float().mean((2, 4)).flatten(1, 2)


@exercise("multimodal.targets")
def check_targets(answer):
    """Start, three places, a question of two ids, an answer of two, end."""
    ids, count = [0, 99, 99, 99, 5, 6, 7, 8, 0], 3
    found = answer(list(ids), count)
    expect(
        isinstance(found, list | tuple) and len(found) == len(ids) - 1,
        "return a list, one target for each id but the last, which is "
        "nobody's input",
    )
    found = [int(t) for t in found]
    expect(
        found != [i if n >= 6 else -100 for n, i in enumerate(ids[:-1])],
        "a target is the NEXT id: position 5 must write 7",
    )
    expect(99 not in found, "no loss on places: the next id is a picture's")
    expect(
        found != [-100, -100, -100, 5, 6, 7, 8, 0],
        "the question is given, not to be learned: only the answer counts",
    )
    expect(
        found != [-100] * 6 + [8, 0],
        "the first id of the answer is lost: the position before it must "
        "write it",
    )
    expect(found[-1] == 0, "the end belongs to the answer: it must be learned")
    expect(
        found == [-100] * 5 + [7, 8, 0],
        "expected -100 five times, then 7, 8 and the end",
    )
    found = answer([0, 99, 4, 0], 2)
    expect(list(found) == [-100, 4, 0], "for [0, 99, 4, 0] and 2 it differs")


@wrong("multimodal.targets", "a target is the NEXT id")
def not_moved(ids, count):
    return [-100] * (len(ids) - count) + ids[-count:-1]


@wrong("multimodal.targets", "no loss on places")
def everything(ids, count):
    return ids[1:]


@wrong("multimodal.targets", "the question is given")
def question_too(ids, count):
    return [-100 if i == 99 else i for i in ids[1:]]


@wrong("multimodal.targets", "first id of the answer")
def one_too_late(ids, count):
    return [-100] * (len(ids) - count) + ids[len(ids) - count + 1 :]


@wrong("multimodal.targets", "one target for each id but the last")
def too_long(ids, count):
    return [-100] * (len(ids) - count) + ids[-count:]


@wrong("multimodal.targets", "the end belongs")
def without_end(ids, count):
    return [-100] * (len(ids) - 1 - count) + ids[-count:-1] + [-100]


@exercise("multimodal.floor")
def check_floor(answer):
    """What is left to a model that cannot see, on answers 8, 4, 4 times."""
    found = answer([8, 4, 4])
    expect(
        isinstance(found, list | tuple) and len(found) == 2,
        "return two numbers, the loss and the accuracy",
    )
    loss, share = map(float, found)
    expect(
        abs(loss - math.log(3)) > 1e-6,
        "the answers are not equally frequent, and a blind model can know "
        "that: its loss is the entropy",
    )
    expect(abs(loss - 1.5) > 1e-6, "in nats: the logarithm is natural")
    expect_close(loss, 1.5 * math.log(2), "the loss is -sum p log p")
    expect(
        abs(share - 1 / 3) > 1e-6, "it would not guess, but always take one"
    )
    expect(
        abs(share - 0.375) > 1e-6,
        "drawing answers by their frequency is right less often than always "
        "giving the most frequent one",
    )
    expect_close(share, 0.5, "the best accuracy is the largest share")
    loss, share = answer([1] * 100)
    expect_close(loss, math.log(100), "for a hundred answers it is ln 100")


@wrong("multimodal.floor", "is the entropy")
def uniform(counts):
    return math.log(len(counts)), max(counts) / sum(counts)


@wrong("multimodal.floor", "natural")
def in_bits(counts):
    p = [n / sum(counts) for n in counts]
    return -sum(x * math.log2(x) for x in p), max(p)


@wrong("multimodal.floor", "always take one")
def chance(counts):
    p = [n / sum(counts) for n in counts]
    return -sum(x * math.log(x) for x in p), 1 / len(p)


@wrong("multimodal.floor", "less often")
def matching(counts):
    p = [n / sum(counts) for n in counts]
    return -sum(x * math.log(x) for x in p), sum(x * x for x in p)
