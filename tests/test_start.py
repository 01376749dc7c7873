"""Starting from counts: what it fits, what it leaves alone, and who refuses it."""

import pytest
import torch
from small_model import caller, refused
from torch.nn import functional as F
from training_setup import TINY, flags, metrics, tiny_data

from llama_tut.config import LlamaConfig
from llama_tut.fast.training import start_from_counts
from llama_tut.model import LlamaForCausalLM

COUNTED = TINY | {
    "steps": 2,
    "hidden_size": 32,
    "first_weights": "counts",
    "tie_word_embeddings": False,
}


def model_and_text(V=20, D=32):
    torch.manual_seed(0)
    config = LlamaConfig(V, D, 2 * D, 2, 2, tie_word_embeddings=False)
    text = torch.randint(0, V - 1, (500,))  # the last token never occurs
    return LlamaForCausalLM(config), text.repeat(40)


def pair_loss(model, text):
    """Mean loss over the text's pairs, without the blocks, in float32."""
    E, U = model.model.embed_tokens.weight, model.output_weight
    logits = F.rms_norm(E, E.shape[1:]) @ U.T
    return F.cross_entropy(logits[text[:-1]], text[1:]).item()


def test_the_fit_comes_close_to_the_entropy_of_the_pairs():
    model, text = model_and_text()
    before = pair_loss(model, text)
    start_from_counts(model, text)
    counts = torch.zeros(20, 20).index_put_(
        (text[:-1], text[1:]), torch.ones(len(text) - 1), accumulate=True
    )
    p = counts / counts.sum(1, keepdim=True).clamp(min=1)
    pairs = counts / counts.sum()
    entropy = -(pairs * p.clamp(min=1e-12).log()).sum().item()
    after = pair_loss(model, text)
    assert entropy < after < entropy + 0.1 < before - 0.3


def test_only_embedding_and_head_change_and_nothing_is_drawn():
    model, text = model_and_text()
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    start_from_counts(model, text, scale=0.15)
    assert torch.equal(state, torch.get_rng_state())
    for name, p in model.named_parameters():
        fitted = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(p, before[name]) != fitted, name
        assert p.isfinite().all() and p.grad is None, name
    size = model.model.embed_tokens.weight.pow(2).mean(1).sqrt()
    torch.testing.assert_close(size, torch.full_like(size, 0.15))


def test_a_run_from_counts_begins_where_the_pairs_are(
    tmp_path, monkeypatch, capsys
):
    """And --plain begins where every run begins."""
    from llama_tut.tools.dataset import load_dataset_info

    data, first = tiny_data(tmp_path), {}
    call = caller("train", monkeypatch, capsys)
    for name, more in (("counts", []), ("plain", ["--plain"])):
        out = tmp_path / name
        call(*flags(COUNTED), "--data", data, "--out", out, *more)
        first[name] = metrics(out)[0]["loss"]
    pairs = load_dataset_info(data).bigram_nats
    assert first["counts"] < pairs + 0.5 < first["plain"] - 1


@pytest.mark.parametrize(
    "more, word",
    [
        (["--tie-word-embeddings"], "--no-tie-word-embeddings"),
        (["--mlp", "mixtral", "--experts", "2"], "leave it out"),
        (["--recompute"], "leave it out"),
        (["--first-weights", "guess"], "--first-weights"),
    ],
)
def test_it_is_refused_in_one_line(tmp_path, monkeypatch, capsys, more, word):
    data = tiny_data(tmp_path)
    call = caller("train", monkeypatch, capsys)
    options = [*flags(COUNTED), "--data", data, "--out", tmp_path / "run"]
    refused(call(*options, *more), word)


def test_a_table_that_is_too_large_is_refused():
    from llama_tut.tools.files import InputError
    from llama_tut.tools.start_config import check_start

    config = LlamaConfig(50_304, 8, 8, 1, 1, tie_word_embeddings=False)
    with pytest.raises(InputError, match="8,192"):
        check_start(config)


def test_torchrun_takes_no_option_of_ours_for_its_own():
    """It completes what looks like the beginning of an option of its own."""
    from torch.distributed.run import get_args_parser
    from train import build_parser

    theirs = get_args_parser()._option_string_actions
    for own in build_parser()._option_string_actions:
        if own.startswith("--") and own != "--help":
            assert not [name for name in theirs if name.startswith(own)], own
