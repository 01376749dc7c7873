"""Chapter 10: the cache, sampling and the loop."""

import copy

import pytest
import torch

from llama_tut.config import InputError, LlamaConfig
from llama_tut.generate import (
    FastModel,
    KVCache,
    Reader,
    generate,
    left_pad,
    pack_weights,
    probabilities,
    speculate,
    stream,
    stream_greedy,
    text_pieces,
)
from llama_tut.model import LlamaForCausalLM


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
    fast = FastModel(model), FastModel(draft)
    found = stream_greedy(*fast, PROMPT, new, **options)
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
@pytest.mark.parametrize("drafted_by", ["itself", "bfloat16", "noise"])
def test_a_guess_never_changes_the_tokens(model, drafted_by, ahead):
    """Whatever the draft guesses, the text is the model's own greedy one."""
    drafts = {
        "itself": model,
        "bfloat16": copy.deepcopy(model).bfloat16(),
        "noise": build(num_hidden_layers=1, hidden_size=12),
    }
    wanted = generate(model, PROMPT, 20)[0, 4:].tolist()
    found = new_tokens(model, drafts[drafted_by], ahead=ahead)
    assert found == wanted


def test_a_perfect_draft_is_always_right(model):
    readers = [Reader(FastModel(model), 60) for _ in range(2)]
    rounds = speculate(*readers, PROMPT[0].tolist(), 5)
    assert [len(next(rounds)) for _ in range(4)] == [1, 6, 6, 6]


def test_guessing_stops_where_streaming_stops(model):
    wanted = [t.item() for t in stream(model, PROMPT, 20)]
    stop = wanted[7]
    cut = wanted[: wanted.index(stop) + 1]
    assert new_tokens(model, model, stop_tokens=[stop]) == cut
    assert len(new_tokens(model, model, new=1)) == 1
    assert new_tokens(model, model, new=0) == []
    assert new_tokens(model, model, new=3, ahead=8) == wanted[:3]


def test_guessing_refuses_what_cannot_work(model):
    two = PROMPT.expand(2, 4)
    with pytest.raises(InputError, match="one prompt"):
        list(stream_greedy(FastModel(model), FastModel(model), two, 3))
    with pytest.raises(InputError, match="do not fit"):
        new_tokens(model, model, new=61)


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
def test_compiled_steps_give_the_same_tokens():
    """And other prompts, of other lengths, compile nothing anew."""
    fast = FastModel(build(num_hidden_layers=1), compiled=True)
    model = build(num_hidden_layers=1)
    readers = [Reader(fast, 40) for _ in range(2)]
    for prompt, stance in (
        ([5, 17, 3], "default"),
        ([9, 2], "fail_on_recompile"),
    ):
        for reader in readers:
            reader.forget(0)
        rounds = speculate(*readers, prompt, 3)
        with torch.compiler.set_stance(stance):
            found = [t for _ in range(4) for t in next(rounds)]
        wanted = generate(model, torch.tensor([prompt]), len(found))
        assert found == wanted[0, len(prompt) :].tolist()
