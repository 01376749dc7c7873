"""Chapter 11: the cache, sampling and the loop."""

import copy

import pytest
import torch

from llama_tut import generate as generation
from llama_tut.config import LlamaConfig
from llama_tut.generate import (
    Bfloat16Linear,
    FastModel,
    FourBitLinear,
    KVCache,
    Reader,
    four_bit_linear,
    generate,
    guess,
    left_pad,
    look_up,
    pack_weights,
    probabilities,
    speculate,
    stream,
    stream_greedy,
    text_pieces,
    to_levels,
)
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.files import InputError


def build(**changes):
    """A small model whose tokens matter to each other."""
    sizes = dict(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


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
    model = build(**changes)
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        full = model(ids)
        cache = KVCache(model.config, 2, 20)
        pieces = [model(p, cache=cache) for p in ids.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-4, rtol=0)
    assert cache.length == 20


def test_the_cache_takes_its_memory_once(model):
    c = model.config
    cache = KVCache(c, 3, 40, torch.bfloat16)
    assert cache.nbytes == 3 * 40 * 2 * 3 * 2 * 8 * 2
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
    ids = torch.randint(61, (2, 7))
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
    counts = drawn.bincount(minlength=61)
    assert counts[p == 0].sum() == 0
    expected = n * p[p > 0]
    chi2 = ((counts[p > 0] - expected).square() / expected).sum()
    assert chi2 < 43.8  # 19 free cells, one chance in a thousand


def test_a_generator_repeats_the_samples(model):
    ids = torch.randint(61, (2, 5))

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
    ids = torch.randint(61, (2, 5))
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
    ids = torch.randint(61, (1, 5))
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
        ([[61]], {}, "tokens 61 to 61, the model has 61"),
        ([[-1]], {}, "tokens -1 to"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
    ],
)
def test_bad_requests_are_refused(model, ids, options, message):
    few = {"max_new_tokens": 5}
    with pytest.raises(InputError, match=message):
        generate(model, torch.tensor(ids).long(), **(few | options))


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_is_held_back_until_its_character_is_whole():
    text = "a π 🦙 z"
    pieces = list(text_pieces(Bytes(), text.encode()))
    assert "".join(pieces) == text
    assert pieces.count("") == 1 + 3
    rest = text_pieces(Bytes(), text.encode()[2:], text.encode()[:2])
    assert "".join(rest) == text[2:]


PROMPT = torch.tensor([[5, 17, 3, 44]])


def new_tokens(model, draft, new=20, **options):
    """The tokens of `stream_greedy`, as a list."""
    found = stream_greedy(FastModel(model), draft, PROMPT, new, **options)
    return [token.item() for token in found]


@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_compute_the_same(tied):
    plain = build(tie_word_embeddings=tied)
    packed = pack_weights(copy.deepcopy(plain))
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            packed(ids), plain(ids), atol=1e-4, rtol=1e-4
        )
    assert (
        generate(packed, ids, 9).tolist() == generate(plain, ids, 9).tolist()
    )


@pytest.mark.parametrize("ahead", [1, 3, 16])
@pytest.mark.parametrize("drafted_by", ["itself", "few bits", "noise", None])
def test_a_guess_never_changes_the_tokens(drafted_by, ahead):
    """Whatever the draft guesses, the text is the model's own greedy one."""
    model = build(hidden_size=96, intermediate_size=96)  # fits four bits
    noise = copy.deepcopy(model)
    torch.nn.init.normal_(noise.model.layers[1].mlp.up_proj.weight)
    drafts = {
        "itself": FastModel(model),
        "few bits": FastModel(model, four_bit_linear, Bfloat16Linear),
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


def test_a_perfect_draft_is_always_right(model, monkeypatch):
    monkeypatch.setattr(generation, "look_up", lambda *_: [])
    fast = FastModel(model)
    rounds = speculate(Reader(fast, 60), fast, PROMPT[0].tolist(), 5)
    assert [len(next(rounds)) for _ in range(4)] == [1, 6, 6, 6]


def test_a_wrong_draft_leaves_nothing_behind(model, monkeypatch):
    """Each round gives one token, and the memory holds exact keys again."""
    monkeypatch.setattr(generation, "look_up", lambda *_: [])
    wrong = [60, 59, 58, 57, 56]
    monkeypatch.setattr(generation, "guess", lambda *_: wrong)
    wanted = generate(model, PROMPT, 8)[0, 4:].tolist()
    assert not set(wrong) & set(wanted)
    reader = Reader(FastModel(model), 60)
    rounds = speculate(reader, reader.model, PROMPT[0].tolist(), 5)
    assert [t for _ in range(8) for t in next(rounds)] == wanted
    exact = Reader(reader.model, 60)
    exact.read([*PROMPT[0].tolist(), *wanted[:-1]])
    assert exact.length == reader.length
    for held, right in zip(reader.memory, exact.memory, strict=True):
        for a, b in zip(held, right, strict=True):
            torch.testing.assert_close(
                a[:, :, : reader.length], b[:, :, : reader.length]
            )


def test_guessing_leaves_the_reader_as_it_was(model, monkeypatch):
    fast, text = FastModel(model), [*PROMPT[0].tolist(), 9]
    reader = Reader(fast, 20)
    reader.read(text[:-1])
    with torch.no_grad():
        assert guess(reader, None, text, 4) == []
        wanted = generate(model, torch.tensor([text]), 4)[0, 5:].tolist()
        monkeypatch.setattr(generation, "look_up", lambda *_: [])
        assert guess(reader, fast, text, 4) == wanted
        assert reader.length == 4


def test_the_text_takes_over_from_the_draft(model, monkeypatch):
    """One token by the draft, then the text was here before."""
    text = [5, 17, 3, 44, 8, 17, 3]
    draft = FastModel(model)
    reader = Reader(draft, 20)
    reader.read(text[:-1])
    steps = []

    def read(tokens, by):
        steps.append(tokens)
        return torch.eye(61)[[44]]

    monkeypatch.setattr(reader, "read", read)
    assert guess(reader, draft, text, 3) == [44, 8, 17, 3, 44, 8]
    assert steps == [[3]]


def test_looking_up_takes_the_latest_place_and_goes_round():
    assert look_up([1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3], 5) == [9, 1, 2, 3, 9]
    assert look_up([4, 4, 4, 4], 3) == [4, 4, 4]
    assert look_up([1, 2, 3], 3) == []
    assert look_up([], 3) == []
    assert look_up([7, 1, 7], 2, size=1) == [1, 7]


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
    assert new_tokens(model, fast, new=3, ahead=8) == wanted[:3]


@pytest.mark.parametrize("drafted", [True, False])
def test_guessing_fills_the_context_to_its_end(model, drafted):
    """The last guesses reach past the context; the tokens do not."""
    wanted = generate(model, PROMPT, 60)[0, 4:].tolist()
    draft = FastModel(model) if drafted else None
    assert new_tokens(model, draft, new=60) == wanted


def test_guessing_refuses_what_cannot_work(model):
    fast, two = FastModel(model), PROMPT.expand(2, 4)
    with pytest.raises(InputError, match="one prompt"):
        list(stream_greedy(fast, fast, two, 3))
    with pytest.raises(InputError, match="do not fit"):
        new_tokens(model, fast, new=61)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_operators_compute_the_same(tied, dtype):
    """Also after tokens were taken back; bfloat16 within its rounding."""
    model = build(tie_word_embeddings=tied).to(dtype)
    ids = torch.randint(61, (12,)).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0].float()
    reader = Reader(FastModel(model), 20)
    found = [reader.read(ids[:7])]
    reader.read([1, 2, 3])
    reader.forget(7)
    found += [reader.read([ids[7]]), reader.read(ids[8:])]
    close = 1e-4 if dtype == torch.float32 else 0.05 * wanted.std().item()
    difference = (torch.cat(found).float() - wanted).abs()
    assert difference.mean() < close
    if dtype == torch.float32:
        assert difference.max() < 10 * close


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens(monkeypatch):
    """And other prompts, of other lengths, compile nothing anew."""
    # Autotuning takes a minute and changes no formula.
    monkeypatch.setitem(generation.COMPILE, "max_autotune", False)
    model = build(num_hidden_layers=1)
    fast = FastModel(model, compiled=True)
    reader = Reader(fast, 40)
    for prompt, stance in (
        ([5, 17, 3], "default"),
        ([9, 2], "fail_on_recompile"),
    ):
        reader.forget(0)
        rounds = speculate(reader, fast, prompt, 3)
        with torch.compiler.set_stance(stance):
            found = [t for _ in range(4) for t in next(rounds)]
        wanted = generate(model, torch.tensor([prompt]), len(found))
        assert found == wanted[0, len(prompt) :].tolist()
