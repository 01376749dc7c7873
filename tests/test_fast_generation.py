"""Chapter 21: reordered weights, few operators, four bits and drafts."""

import copy
from functools import partial

import pytest
import torch
from small_model import random_model

from llama_tut.fast import generation
from llama_tut.fast.generation import (
    Bfloat16Linear,
    FastModel,
    FastReader,
    FourBitLinear,
    four_bit_draft,
    four_bit_linear,
    pack_weights,
    to_levels,
)
from llama_tut.generate import generate, speculate, stream, stream_guessing
from llama_tut.tools.files import InputError


@pytest.fixture(scope="module")
def model():
    return random_model()


PROMPT = torch.tensor([[5, 17, 3, 44]])


def new_tokens(model, draft, new=20, **options):
    """The tokens of a fast model whose draft guesses, as a list."""
    make = partial(FastReader, draft=draft)
    found = stream_guessing(
        FastModel(model), PROMPT, new, make_reader=make, **options
    )
    return [token.item() for token in found]


@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_compute_the_same(tied):
    plain = random_model(tie_word_embeddings=tied)
    packed = pack_weights(copy.deepcopy(plain))
    ids = torch.randint(97, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            packed(ids), plain(ids), atol=1e-4, rtol=1e-4
        )
    assert (
        generate(packed, ids, 9).tolist() == generate(plain, ids, 9).tolist()
    )


@pytest.mark.parametrize("ahead", [1, 4, 16])
@pytest.mark.parametrize("drafted_by", ["itself", "few bits", "noise", None])
def test_a_guess_never_changes_the_tokens(drafted_by, ahead):
    """Whatever the draft guesses, the text is the model's own greedy one."""
    model = random_model(
        hidden_size=96, intermediate_size=96
    )  # fits four bits
    noise = copy.deepcopy(model)
    torch.nn.init.normal_(noise.model.layers[1].mlp.up_proj.weight)
    drafts = {
        "itself": FastModel(model),
        "few bits": four_bit_draft(model),
        "noise": FastModel(noise),
        None: None,
    }
    few = drafts["few bits"].layers[0]
    assert all(
        isinstance(linear, FourBitLinear)
        for linear in (few.qkv, few.out, few.gate_up, few.down)
    )
    wanted = generate(model, PROMPT, 20)[0, 4:].tolist()
    assert new_tokens(model, drafts[drafted_by], ahead=ahead) == wanted


@pytest.fixture
def no_lookup(monkeypatch):
    """Only the draft guesses."""
    monkeypatch.setattr(generation, "prompt_lookup", lambda *_: [])


def test_a_perfect_draft_is_always_right(model, no_lookup):
    fast = FastModel(model)
    reader = FastReader(fast, 60, draft=fast)
    rounds = speculate(reader, PROMPT[0].tolist(), 10)
    assert [len(next(rounds)) for _ in range(4)] == [1, 6, 6, 6]


def test_a_wrong_draft_leaves_nothing_behind(model, monkeypatch):
    """Each round gives one token, and the cache holds exact keys again."""
    wrong = [60, 59, 58, 57, 56]
    wanted = generate(model, PROMPT, 8)[0, 4:].tolist()
    assert not set(wrong) & set(wanted)
    reader = FastReader(FastModel(model), 60)
    monkeypatch.setattr(reader, "propose", lambda *_: wrong)
    rounds = speculate(reader, PROMPT[0].tolist(), 5)
    assert [t for _ in range(8) for t in next(rounds)] == wanted
    exact = FastReader(reader.model, 60)
    exact.read([*PROMPT[0].tolist(), *wanted[:-1]], 1)
    assert exact.length == reader.length
    for held, right in zip(reader.cache, exact.cache, strict=True):
        for a, b in zip(held, right, strict=True):
            torch.testing.assert_close(
                a[:, :, : reader.length], b[:, :, : reader.length]
            )


def test_guessing_leaves_the_reader_as_it_was(model, no_lookup):
    fast, text = FastModel(model), [*PROMPT[0].tolist(), 9]
    alone, drafted = FastReader(fast, 20), FastReader(fast, 20, fast)
    wanted = generate(model, torch.tensor([text]), 4)[0, 5:].tolist()
    for reader, found in ((alone, []), (drafted, wanted)):
        reader.read(text[:-1], 1)
        assert reader.propose(text, 8) == found
        assert reader.length == 4


def test_the_text_takes_over_from_the_draft(model, monkeypatch):
    """One token by the draft, then the text was here before."""
    text = [5, 17, 3, 44, 8, 17, 3]
    draft = FastModel(model)
    reader = FastReader(draft, 20, draft)
    reader.read(text[:-1], 1)
    steps = []

    def read(tokens, last, by):
        steps.append((tokens, last))
        return torch.eye(97)[[44]]

    monkeypatch.setattr(reader, "read", read)
    assert reader.propose(text, 6) == [44, 8, 17, 3, 44, 8]
    assert steps == [([3], 1)]


def test_levels_are_off_by_half_a_step_at_most():
    torch.manual_seed(0)
    weight = torch.randn(48, 96)
    weight[5] = 0  # a row without a range
    weight[6] = 3.0
    levels, scales = to_levels(weight)
    assert levels.min() == 0 and levels.max() == 15
    step, middle = scales.float().transpose(0, 1).unbind(-1)  # [O, G]
    found = (
        middle[..., None]
        + (levels.unflatten(1, (-1, 32)) - 8) * step[..., None]
    )
    error = (found.flatten(1) - weight).abs().unflatten(1, (-1, 32))
    # And bfloat16's rounding of step and middle, 2**-9 of 8 steps and of m.
    slack = (8 * step.abs() + middle.abs() + 8 * step) * 2**-8
    assert (error <= (step / 2 + slack)[..., None] + 1e-9).all()
    product = FourBitLinear(weight)(torch.eye(96)).T
    torch.testing.assert_close(
        product, found.flatten(1), rtol=2**-7, atol=1e-3
    )


def test_matrices_that_do_not_fit_stay_in_16_bits():
    kinds = [
        type(four_bit_linear(torch.randn(*s)))
        for s in ((48, 64), (40, 64), (48, 80))
    ]
    assert kinds == [FourBitLinear, Bfloat16Linear, Bfloat16Linear]


def test_guessing_stops_where_streaming_stops(model):
    fast = FastModel(model)
    wanted = [t.item() for t in stream(model, PROMPT, 20)]
    stop = wanted[7]
    cut = wanted[: wanted.index(stop) + 1]
    assert new_tokens(model, fast, stop_tokens=[stop]) == cut
    assert len(new_tokens(model, fast, new=1)) == 1
    assert new_tokens(model, fast, new=0) == []
    assert new_tokens(model, fast, new=3, ahead=16) == wanted[:3]


@pytest.mark.parametrize("drafted", [True, False])
def test_guessing_fills_the_context_to_its_end(model, drafted):
    """The last guesses reach past the context; the tokens do not."""
    wanted = generate(model, PROMPT, 60)[0, 4:].tolist()
    draft = FastModel(model) if drafted else None
    assert new_tokens(model, draft, new=60) == wanted


def test_guessing_refuses_what_cannot_work(model):
    with pytest.raises(InputError, match="do not fit"):
        new_tokens(model, None, new=97)
    damaged = random_model()
    with torch.no_grad():
        damaged.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="logits are not finite"):
        new_tokens(damaged, None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_operators_compute_the_same(tied, dtype):
    """Also after tokens were taken back; bfloat16 within its rounding."""
    model = random_model(tie_word_embeddings=tied).to(dtype)
    ids = torch.randint(97, (12,)).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0].float()
    reader = FastReader(FastModel(model), 20)
    found = [reader.read(ids[:7], 7)]
    assert reader.read([1, 2, 3], 2).shape == (2, 97)
    reader.truncate(7)
    found += [reader.read([ids[7]], 1), reader.read(ids[8:], 4)]
    close = 1e-4 if dtype == torch.float32 else 0.05 * wanted.std().item()
    difference = (torch.cat(found).float() - wanted).abs()
    assert difference.mean() < close
    if dtype == torch.float32:
        assert difference.max() < 10 * close


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens(monkeypatch):
    """Another prompt, of another length, compiles nothing anew.

    Both continue without a repetition, so all guesses are the draft's.
    """
    # Autotuning takes a minute and changes no formula.
    monkeypatch.setitem(generation.COMPILE, "max_autotune", False)
    model = random_model(num_hidden_layers=1)
    fast = FastModel(model, compiled=True)
    reader = FastReader(fast, 40, draft=fast)
    for prompt, stance in (
        ([5, 17, 3], "default"),
        ([8, 30], "fail_on_recompile"),
    ):
        reader.truncate(0)
        rounds = speculate(reader, prompt, 6)
        with torch.compiler.set_stance(stance):
            found = [t for _ in range(4) for t in next(rounds)]
        wanted = generate(model, torch.tensor([prompt]), len(found))
        assert found == wanted[0, len(prompt) :].tolist()
