"""Our model against transformers' `LlamaForCausalLM`: random weights, values and gradients."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.files import InputError

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
# An original context of 32: the texts of 48 tokens go beyond it.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "some kv heads": {},
    "one kv head": {"num_key_value_heads": 1},
    "all kv heads": {"num_key_value_heads": 6},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 4},
    "tied head": {"tie_word_embeddings": True},
    "odd vocabulary": {"vocab_size": 4099},
    "eps 1e-6": {"rms_norm_eps": 1e-6},
    "large eps": {"rms_norm_eps": 1e-2},
    "other theta": {"rope_parameters": {**DEFAULT, "rope_theta": 1e6}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {
        "rope_parameters": {**DEFAULT, "rope_type": "linear", "factor": 4.0}
    },
    "llama3 rope, tied, wide": {
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "num_key_value_heads": 1,
    },
}


def their_config(**changes):
    return transformers.LlamaConfig(
        **{"rope_parameters": DEFAULT, **BASE, **changes}
    )


def pair(**changes):
    """transformers' model with random weights, and ours with the same."""
    torch.manual_seed(0)
    config = their_config(initializer_range=0.15, **changes)
    theirs = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name:  # gains of 1 would hide an exchange
                p.uniform_(0.5, 1.5)
    state = theirs.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    ours = LlamaForCausalLM(LlamaConfig.from_hf(config))
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def tokens(config, shape=(2, 48)):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


def assert_same_gradients(ours, theirs):
    """Every parameter's gradient, relative to the largest of its tensor.

    1e-4: the loss and attention sum in another order, in float32.
    """
    other = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(other)
    for name, p in ours.named_parameters():
        error = (p.grad - other[name].grad).abs().max()
        assert error <= 1e-4 * other[name].grad.abs().max(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients(name):
    ours, theirs = pair(**VARIANTS[name])
    ids = tokens(ours.config)
    expected = theirs(ids)
    torch.testing.assert_close(
        ours(ids), expected.logits, rtol=1e-4, atol=1e-4
    )

    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids), expected.logits, rtol=1e-4, atol=1e-4
        )

    targets = ids[:, 1:].clone()
    targets[0, 5:9] = -100
    labels = torch.cat((ids[:, :1], targets), dim=1)
    loss = ours(ids[:, :-1], targets=targets)
    other = theirs(ids, labels=labels).loss
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    loss.backward()
    other.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", ["some kv heads", "llama3 rope"])
def test_long_positions(name):
    """Position numbers far beyond the original context, also by row."""
    ours, theirs = pair(**VARIANTS[name])
    ids = tokens(ours.config)
    one = torch.arange(200, 248)
    rows = torch.stack((one, one - 150))
    for ours_takes, theirs_take in ((one, one.expand(2, -1)), (rows, rows)):
        torch.testing.assert_close(
            ours(ids, position_ids=ours_takes),
            theirs(ids, position_ids=theirs_take).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_llama3_rope_matters():
    """The test above can see scaling: without it the logits differ."""
    ours, _ = pair(rope_parameters=LLAMA3)
    plain = {**LLAMA3, "rope_type": "default"}
    other = LlamaForCausalLM(
        LlamaConfig.from_hf(their_config(rope_parameters=plain))
    )
    other.load_state_dict(ours.state_dict())
    ids = tokens(ours.config)
    assert (ours(ids) - other(ids)).abs().max() > 0.1


def test_two_thousand_tokens():
    """The promise of the book: 2,048 tokens, float32, within 1e-4."""
    ours, theirs = pair(max_position_embeddings=2048)
    ids = tokens(ours.config, (1, 2048))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids), theirs(ids).logits, rtol=0, atol=1e-4
        )


def test_padded_rows():
    """A mask over the keys: tokens that are no padding get the same logits."""
    ours, theirs = pair()
    ids = tokens(ours.config, (2, 20))
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :7] = False
    positions = (real.cumsum(1) - 1).clamp(min=0)
    mask = real[:, None, None, :] & torch.ones(20, 20).tril().bool()
    expected = theirs(
        ids, attention_mask=real.long(), position_ids=positions
    ).logits
    got = ours(ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["some kv heads", "llama3 rope"])
def test_bfloat16(name):
    """In bf16 two programs round at different places: compare what they say.

    The two distributions must be closer to each other than bf16's own
    distance from float32 allows, and their first choices agree wherever
    float32's choice is clear.
    """
    ours, theirs = pair(**VARIANTS[name])
    ids = tokens(ours.config, (4, 48))
    with torch.no_grad():
        exact = theirs(ids).logits
        logits = ours.bfloat16()(ids)
        other = theirs.bfloat16()(ids).logits
    assert logits.dtype == torch.bfloat16
    p, q, r = (F.log_softmax(x.float(), -1) for x in (logits, other, exact))
    between = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    rounding = F.kl_div(q, r, reduction="none", log_target=True).sum(-1)
    assert between.mean() < 2 * rounding.mean() < 0.02
    best = exact.topk(2, dim=-1).values
    clear = best[..., 0] - best[..., 1] > 0.2
    assert clear.float().mean() > 0.5
    assert torch.equal(logits.argmax(-1)[clear], other.argmax(-1)[clear])


@pytest.mark.parametrize(
    "named, change",
    {
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "hidden_act": {"hidden_act": "gelu"},
        "attention_dropout": {"attention_dropout": 0.1},
        "dynamic": {
            "rope_parameters": {
                **DEFAULT,
                "rope_type": "dynamic",
                "factor": 2.0,
            }
        },
        "yarn": {
            "rope_parameters": {**DEFAULT, "rope_type": "yarn", "factor": 2.0}
        },
    }.items(),
)
def test_what_we_do_not_build_is_refused_by_name(named, change):
    with pytest.raises(InputError, match=named):
        LlamaConfig.from_hf(their_config(**change))


@pytest.mark.parametrize("model_type", ["qwen2", "gemma", "phi3"])
def test_other_models_are_refused(model_type):
    config = {**their_config().to_dict(), "model_type": model_type}
    with pytest.raises(InputError, match=model_type):
        LlamaConfig.from_hf(config)


def test_meta_device_takes_no_memory():
    """A model of 8 billion parameters is built from shapes alone."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        logits = model(torch.zeros(1, 3, dtype=torch.long))
    assert logits.shape == (1, 3, 128_256)
    assert all(p.is_meta for p in model.parameters())
