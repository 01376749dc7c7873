"""Chapter 11: the cache, sampling, the loop, and guesses from the text."""

import argparse
import difflib
import inspect
import random

import pytest
import torch
from small_model import random_model
from torch.nn import functional as F
from transformers import AutoTokenizer

from llama_tut.generate import (
    KVCache,
    Reader,
    choose,
    generate,
    left_pad,
    probabilities,
    prompt_lookup,
    speculate,
    stream,
    stream_guessing,
)
from llama_tut.tools.files import InputError
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 6},
        {"head_dim": 10},
        {"tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("cuts", [[1] * 20, [19, 1], [5, 1, 7, 7], [20]])
def test_cached_logits_equal_full_logits(changes, cuts):
    model = random_model(**changes)
    ids = torch.randint(97, (2, 20))
    with torch.no_grad():
        full = model(ids)
        cache = KVCache(model.config, 2, 20)
        pieces = [model(p, cache=cache) for p in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-4, rtol=0)
    assert cache.length == 20


def test_the_cache_takes_its_memory_once(model):
    c = model.config
    cache = KVCache(c, 3, 40, torch.bfloat16)
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)
    assert total == 3 * 40 * 2 * 3 * 2 * 8 * 2
    keys, values = torch.randn(2, 3, 2, 5, 8).bfloat16()
    place = cache[0].keys.data_ptr()
    for length in (5, 10):
        k, v = cache[0].update(keys, values)
        assert k.shape == v.shape == (3, 2, length, 8)
        assert k.data_ptr() == place
        assert torch.equal(k[:, :, -5:], keys)
    with pytest.raises(ValueError, match="40"):
        cache[0].update(*torch.zeros(2, 3, 2, 31, 8))


def test_greedy_equals_the_plain_loop(model):
    ids = torch.randint(97, (2, 7))
    plain = ids
    for _ in range(12):
        with torch.no_grad():
            new = model(plain)[:, -1].argmax(-1, keepdim=True)
        plain = torch.cat([plain, new], 1)
    for chunk_size in (None, 1, 3, 7, 100):
        ours = generate(model, ids, max_new_tokens=12, chunk_size=chunk_size)
        assert torch.equal(ours, plain)


def test_padded_rows_equal_rows_alone(model):
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10], [11]]
    ids, mask = left_pad(prompts, pad_id=60)
    assert ids[1].tolist() == [60] * 6 + [9, 10]
    for chunk_size in (None, 3):
        out = generate(
            model,
            ids,
            max_new_tokens=9,
            chunk_size=chunk_size,
            attention_mask=mask,
        )
        for row, prompt in zip(out, prompts, strict=True):
            alone = generate(model, torch.tensor([prompt]), max_new_tokens=9)[
                0
            ]
            assert torch.equal(row[8 - len(prompt) :], alone)


def test_top_p_keeps_the_token_that_crosses():
    p = torch.tensor([[0.15, 0.5, 0.1, 0.25]])
    expected = torch.tensor([[0, 2 / 3, 0, 1 / 3]])
    torch.testing.assert_close(probabilities(p.log(), top_p=0.7), expected)
    one = probabilities(p.log(), top_p=0.4)
    torch.testing.assert_close(one, torch.tensor([[0, 1.0, 0, 0]]))
    torch.testing.assert_close(probabilities(p.log(), top_p=1.0), p)
    both = probabilities(p.log(), top_k=3, top_p=0.8)
    torch.testing.assert_close(both, torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    equal = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    expected = torch.tensor([[2 / 3, 1 / 3, 0, 0]])
    # Two tokens reach 0.75 exactly: the third is not needed.
    torch.testing.assert_close(probabilities(equal, top_p=0.75), expected)
    only = torch.tensor([[1.0, 0, 0, 0]])
    torch.testing.assert_close(probabilities(equal, top_p=0.5), only)
    torch.testing.assert_close(probabilities(p.log(), top_k=10**20), p)
    hot = probabilities(p.log(), temperature=0.5)
    torch.testing.assert_close(hot, p**2 / (p**2).sum())


def test_samples_follow_the_model(model):
    prompt = torch.tensor([[3, 1, 4]])
    n = 20_000
    with torch.no_grad():
        p = probabilities(model(prompt)[:, -1], 3.0, top_k=20)[0]
    drawn = generate(
        model,
        prompt.expand(n, 3),
        max_new_tokens=1,
        temperature=3.0,
        top_k=20,
        generator=torch.Generator().manual_seed(0),
    )[:, 3]
    counts = drawn.bincount(minlength=97)
    assert counts[p == 0].sum() == 0
    expected = n * p[p > 0]
    chi2 = ((counts[p > 0] - expected).square() / expected).sum()
    assert chi2 < 43.8  # 19 free cells, one chance in a thousand


def test_a_generator_repeats_the_samples(model):
    ids = torch.randint(97, (2, 5))

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(
            model,
            ids,
            max_new_tokens=10,
            temperature=1.5,
            generator=generator,
        )

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_stop_tokens_end_rows_and_then_the_loop(model):
    ids = torch.randint(97, (2, 5))
    free = generate(model, ids, max_new_tokens=15)[:, 5:]
    stop = free[0, 2].item()
    first = [(row == stop).nonzero()[:1].flatten().tolist() for row in free]
    out = generate(model, ids, max_new_tokens=15, stop_tokens=[stop])[:, 5:]
    assert first[0][0] <= 2
    for row, plain, at in zip(out, free, first, strict=True):
        end = at[0] + 1 if at else 15
        assert torch.equal(row[:end], plain[:end])
        assert (row[end:] == stop).all()
    alone = generate(model, ids[:1], max_new_tokens=15, stop_tokens=[stop])
    assert alone.shape[1] == 5 + first[0][0] + 1


def test_generation_leaves_no_trace(model):
    """Outside stays as it was: gradients on, inputs unchanged."""
    ids = torch.randint(97, (1, 5))
    before = ids.clone()
    tokens = stream(model, ids, 3)
    next(tokens)
    assert torch.is_grad_enabled()
    assert len(list(tokens)) == 2
    assert torch.equal(ids, before)
    assert torch.equal(generate(model, ids, max_new_tokens=0), ids)
    model(ids).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([[]], {}, "prompt is empty"),
        ([[1] * 60], {}, "60 tokens of prompt and 5 new ones.* of 64"),
        ([[97]], {}, "tokens 97 to 97, the model has 97"),
        ([[-1]], {}, "tokens -1 to"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": 1e-30}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
    ],
)
def test_bad_requests_are_refused(model, ids, options, message):
    few = {"max_new_tokens": 5}
    with pytest.raises(InputError, match=message):
        generate(model, torch.tensor(ids).long(), **(few | options))


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1], [1, 1, 0]],  # on the right
        [[1, 1, 1], [1, 0, 1]],  # in the middle
        [[1, 1, 1], [0, 0, 0]],
        [[1, 1], [0, 1]],
    ],
)
def test_padding_elsewhere_than_on_the_left_is_refused(model, mask):
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    with pytest.raises(InputError, match="padding on the left"):
        generate(model, ids, 2, attention_mask=torch.tensor(mask))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_model_is_named(value, options):
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(InputError, match="logits are not finite"):
        generate(model, torch.tensor([[1, 2]]), 2, **options)
    with pytest.raises(InputError, match="logits are not finite"):
        list(stream_guessing(model, torch.tensor([[1, 2]]), 2))
    with pytest.raises(InputError, match="logits are not finite"):
        choose(torch.tensor([[0.0, value]]))


# Guesses from the text

PROMPT = torch.tensor([[5, 17, 3, 44]])


def guessed(model, new=20, **options):
    """The tokens of `stream_guessing`, as a list."""
    return [t.item() for t in stream_guessing(model, PROMPT, new, **options)]


def test_looking_up_takes_the_latest_place_and_goes_round():
    text = [1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3]
    assert prompt_lookup(text, 5) == [9, 1, 2, 3, 9]
    assert prompt_lookup([4, 4, 4, 4], 3) == [4, 4, 4]
    assert prompt_lookup([1, 2, 3], 3) == []
    assert prompt_lookup([], 3) == []
    assert prompt_lookup([7, 1, 7], 2, size=1) == [1, 7]


@pytest.mark.parametrize("ahead", [1, 3, 16])
@pytest.mark.parametrize("guesser", ["text", "noise", "itself", "nothing"])
def test_a_guess_never_changes_the_tokens(model, guesser, ahead):
    """Whatever is guessed, the text is the model's own greedy one."""
    wanted = generate(model, PROMPT, 20)[0, 4:].tolist()
    random = torch.Generator().manual_seed(0)

    class Guesser(Reader):
        def propose(self, text, ahead):
            if guesser == "noise":
                return torch.randint(97, (ahead,), generator=random).tolist()
            if guesser == "itself":  # right, up to the last one
                done = len(text) - PROMPT.shape[1]
                return (wanted[done:] + [0] * ahead)[:ahead]
            return []

    make = Reader if guesser == "text" else Guesser
    assert guessed(model, ahead=ahead, make_reader=make) == wanted


def test_right_guesses_save_passes(model):
    wanted = generate(model, PROMPT, 40)[0, 4:].tolist()

    class Oracle(Reader):
        def propose(self, text, ahead):
            done = len(text) - PROMPT.shape[1]
            return wanted[done : done + ahead]

    rounds = speculate(Oracle(model, 64), PROMPT[0].tolist(), 5)
    assert [len(next(rounds)) for _ in range(4)] == [1, 6, 6, 6]


def test_a_wrong_guess_leaves_nothing_behind(model):
    """Each round gives one token, and the cache holds exact keys again."""
    wanted = generate(model, PROMPT, 8)[0, 4:].tolist()
    wrong = [60, 59, 58, 57, 56]
    assert not set(wrong) & set(wanted)

    class Wrong(Reader):
        def propose(self, text, ahead):
            return wrong

    reader = Wrong(model, 60)
    rounds = speculate(reader, PROMPT[0].tolist(), 5)
    assert [t for _ in range(8) for t in next(rounds)] == wanted
    exact = Reader(model, 60)
    exact.read([*PROMPT[0].tolist(), *wanted[:-1]], 1)
    n = exact.cache.length
    assert reader.cache.length == n
    for held, right in zip(reader.cache, exact.cache, strict=True):
        for name in ("keys", "values"):
            a, b = getattr(held, name), getattr(right, name)
            torch.testing.assert_close(a[:, :, :n], b[:, :, :n])


def test_guessing_stops_where_streaming_stops(model):
    wanted = [t.item() for t in stream(model, PROMPT, 20)]
    stop = wanted[7]
    cut = wanted[: wanted.index(stop) + 1]
    assert guessed(model, stop_tokens=[stop]) == cut
    assert guessed(model, new=1) == wanted[:1]
    assert guessed(model, new=0) == []
    assert guessed(model, new=3) == wanted[:3]


def test_guessing_fills_the_context_to_its_end(model):
    """The last guesses reach past the context; the tokens do not."""
    wanted = generate(model, PROMPT, 60)[0, 4:].tolist()
    assert guessed(model, new=60) == wanted


def test_guessing_refuses_what_cannot_work(model):
    with pytest.raises(InputError, match="one prompt"):
        list(stream_guessing(model, PROMPT.expand(2, 4), 3))
    with pytest.raises(InputError, match="do not fit"):
        guessed(model, new=97)


@pytest.mark.slow
def test_a_wrong_offset_hurts_while_the_prompt_lies_in_the_future():
    """Start again at 0: bad until the prompt is passed. By one: hardly."""
    folder = find_pretrained()
    smollm2 = load_pretrained(folder).eval()
    text = "\n".join(map(inspect.getdoc, (argparse, random, difflib)))
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids[:256]
    ids, T = torch.tensor([ids]), 64

    @torch.no_grad()
    def losses(wrong_by):
        """The loss of each token after the prompt, [192]."""
        cache = KVCache(smollm2.config, 1, 256)
        first = smollm2(ids[:, :T], cache=cache)
        positions = torch.arange(T, 256) + wrong_by
        then = smollm2(ids[:, T:], position_ids=positions, cache=cache)
        z = torch.cat([first[:, -1:], then], dim=1)[0, :-1]
        return F.cross_entropy(z, ids[0, T:], reduction="none")

    right = losses(0)
    again, by_one = losses(-T) - right, losses(-1) - right
    assert again[:64].mean() > max(1, 3 * again[64:128].mean())
    assert by_one[64:].abs().mean() < 0.1
