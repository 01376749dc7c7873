"""Chapter 20: packed rows give the sums of plain rows."""

import pytest
import torch
from small_model import (
    SIZES,
    enlarge,
    plain_sums,
    random_items,
    random_model,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM as TheirLlama

from llama_tut.config import LlamaConfig
from llama_tut.fast import scoring
from llama_tut.fast.scoring import (
    can_pack_rows,
    pack,
    packed_mask,
    score_packed,
)
from llama_tut.hellaswag import Example, score_items, score_rows
from llama_tut.model import LlamaForCausalLM


@pytest.fixture
def packed_calls(monkeypatch):
    """How many batches really were packed."""
    calls, real = [], scoring.read_packed

    def count(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(scoring, "read_packed", count)
    return calls


def test_a_packed_row_by_hand():
    packed = pack([([5, 6], [[1, 2, 3], [4], [7, 8], [9]])])
    assert packed.ids.tolist() == [[5, 6, 1, 2, 7]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.parts.tolist() == [[0, 0, 1, 1, 3]]
    assert packed.rows.tolist() == [1, 2, 3, 1, 1, 4, 1]
    assert packed.targets.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert packed.owners.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert packed_mask(packed.parts)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_a_shorter_row_is_filled_and_not_read():
    items = [([5, 6], [[1, 2, 3], [4], [7, 8], [9]]), ([3], [[1]] * 4)]
    packed = pack(items)
    assert packed.ids.tolist()[1] == [3, 0, 0, 0, 0]
    assert packed.rows.tolist()[7:] == [5, 5, 5, 5]
    assert packed.owners.tolist()[7:] == [4, 5, 6, 7]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_packed_rows_give_the_sum_of_the_definition(tied, whose, packed_calls):
    if whose == "ours":
        model = random_model(tie_word_embeddings=tied)
    else:
        config = TheirConfig(**SIZES, tie_word_embeddings=tied)
        model = enlarge(TheirLlama(config))
    items = random_items(7)
    packed = torch.tensor(score_packed(model, items, rows_at_once=5))
    expected = plain_sums(model, items)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-3)
    assert len(packed_calls) == 1


def test_ours_and_transformers_score_alike():
    theirs = enlarge(TheirLlama(TheirConfig(**SIZES, rms_norm_eps=1e-5)))
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.load_state_dict(theirs.state_dict())
    items = random_items(5)
    a, b = (torch.tensor(score_packed(m, items)) for m in (model, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


class Counted(nn.Module):
    """Positions learned by place, as GPT-2 has them: rows start at 0."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight
        self.places = nn.Parameter(torch.randn(64, 48))

    def forward(self, ids):
        return self.weight[ids] + self.places[: ids.shape[1]]


def test_models_that_count_positions_themselves_take_rows(packed_calls):
    """Packed, they would be scored wrongly and without a word."""
    config = GPT2Config(
        vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64
    )
    counting = random_model(tie_word_embeddings=True)
    counting.model.embed_tokens = Counted(counting.model.embed_tokens)
    items = random_items(5)
    for model in (enlarge(GPT2LMHeadModel(config)), counting):
        assert not can_pack_rows(model)
        found = torch.tensor(score_packed(model, items, 64))
        expected = plain_sums(model, items)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert packed_calls == []


def test_an_example_that_exceeds_the_context_takes_rows(packed_calls):
    model = random_model(max_position_embeddings=16)
    items = random_items(9, low=3, high=12)
    examples = [Example(i, "c", tuple("abcd"), i % 4) for i in range(9)]
    plain, packed = (
        score_items(model, examples, items, 1, score_batch)
        for score_batch in (score_rows, score_packed)
    )
    assert 0 < len(packed_calls) < 9
    for a, b in zip(plain, packed, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-3)
        assert a | {"scores": 0} == b | {"scores": 0}
