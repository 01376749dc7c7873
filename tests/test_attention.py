"""Attention beyond chapter 5: masks, padding, dtypes, compile, the seam."""

import pytest
import torch
from torch.nn import functional as F

from llama_tut.attention import LlamaAttention, attend, causal_mask
from llama_tut.config import LlamaConfig
from llama_tut.fast.training import blocked_attention
from llama_tut.rope import LlamaRotaryEmbedding

B, H, K, C = 2, 6, 2, 8
CONFIG = LlamaConfig(
    hidden_size=48, num_attention_heads=H, num_key_value_heads=K, head_dim=C
)


both = pytest.mark.parametrize(
    "attend", [attend, blocked_attention], ids=["plain", "blocked"]
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def heads(T, S, **kwargs):
    """Random q [B, H, T, C], k and v [B, K, S, C]."""
    shapes = (B, H, T, C), (B, K, S, C), (B, K, S, C)
    return [torch.randn(shape, **kwargs) for shape in shapes]


def reference(q, k, v, mask):
    """PyTorch's attention with copied keys and a full mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    mask = mask.broadcast_to(*q.shape[:3], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 9), (5, 5), (5, 9), (130, 300)])
def test_none_is_the_causal_mask(T, S):
    q, k, v = heads(T, S)
    mask = causal_mask(T, S)
    assert mask.sum(-1).tolist() == list(range(S - T + 1, S + 1))
    torch.testing.assert_close(attend(q, k, v), reference(q, k, v, mask))
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v))


@both
@pytest.mark.parametrize("T, S", [(5, 9), (300, 310)])
@pytest.mark.parametrize("form", ["TS", "11TS", "B11S", "B1TS"])
def test_masks_of_every_form(attend, form, T, S):
    sizes = {"B": B, "T": T, "S": S, "1": 1}
    mask = torch.rand([sizes[letter] for letter in form]) < 0.5
    mask[..., 0] = True  # something to read in each row
    q, k, v = heads(T, S)
    expected = reference(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask), expected)


def test_a_mask_is_the_whole_rule():
    """With every key allowed, the first token reads the last one."""
    q, k, v = heads(4, 4)
    everything = torch.ones(4, 4, dtype=torch.bool)
    out = attend(q, k, v, everything)
    v[:, :, -1] += 1
    assert (attend(q, k, v, everything)[:, :, 0] != out[:, :, 0]).all()


def test_gradients():
    inputs = heads(200, 333, requires_grad=True)
    seed = torch.randn(B, H, 200, C)
    ours = torch.autograd.grad(attend(*inputs), inputs, seed)
    expected = torch.autograd.grad(
        reference(*inputs, causal_mask(200, 333)), inputs, seed
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_neighbouring_heads_share_keys():
    """Head h reads key head h // G: side by side, not tiled."""
    q, k, v = heads(7, 7)
    v[:, 1] = 0
    silent = (attend(q, k, v) == 0).flatten(2).all(-1)
    assert silent.tolist() == B * [[False] * 3 + [True] * 3]


@both
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.half, torch.double]
)
@pytest.mark.parametrize("T", [6, 40])
def test_a_row_with_nothing_to_read_stays_finite(attend, dtype, T):
    """Such a row poisons neither itself, nor others, nor gradients."""
    inputs = heads(T, T, dtype=dtype, requires_grad=True)
    mask = causal_mask(T, T).repeat(B, 1, 1, 1)
    mask[0, :, :, :3] = False  # row 0: three tokens of padding in front
    out = attend(*inputs, mask)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(x.isfinite().all() for x in (out, *grads))
    short = attend(*(x[:, :, 3:] for x in inputs))
    exact = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(out[0, :, 3:], short[0], **exact)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_16_bits_stay_near_float32(attend, dtype):
    """8 or 11 significant bits in scores, weights and output."""
    q, k, v = (x.to(dtype) for x in heads(150, 150))
    out = attend(q, k, v)
    exact = attend(q.float(), k.float(), v.float())
    assert out.dtype == dtype
    error = (out - exact).norm() / exact.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("T, S", [(1, 9), (5, 5), (5, 9)])
def test_pytorchs_kernel_is_called_as_fast_as_it_goes(monkeypatch, T, S):
    """A mask rules out the fastest kernels, so one is made only for 1 < T < S."""
    seen = {}
    real = F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, **options):
        seen.update(options, mask=attn_mask)
        return real(q, k, v, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    attend(*heads(T, S))
    assert (seen["mask"] is not None) == (1 < T < S)
    assert seen["is_causal"] == (T == S) and seen["enable_gqa"]


def test_an_instance_may_attend_by_another_function():
    """Seam of chapter 19: one module changes, no other does."""
    one, other = LlamaAttention(CONFIG), LlamaAttention(CONFIG)
    args = inputs(5)
    before = one(*args), other(*args)
    one.attend = lambda q, k, v, attention_mask: torch.zeros_like(q)
    assert (one(*args) == 0).all() and (before[0] != 0).any()
    assert torch.equal(other(*args), before[1])
    assert list(one.state_dict()) == list(other.state_dict())


def test_large_scores_do_not_overflow():
    q, k, v = heads(5, 5)
    out = attend(1e4 * q, 1e4 * k, v)
    assert out.isfinite().all()


def inputs(T, start=0):
    """x [B, T, D] and the tables of T positions."""
    positions = torch.arange(start, start + T)
    return torch.randn(B, T, 48), *LlamaRotaryEmbedding(CONFIG)(positions)


def test_autocast():
    attention = LlamaAttention(CONFIG)
    x, cos, sin = inputs(150)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x, cos, sin)
    assert y.dtype == torch.bfloat16
    exact = attention(x, cos, sin)
    assert (y - exact).norm() < 2e-2 * exact.norm()
    y.float().sum().backward()
    assert attention.q_proj.weight.grad.dtype == torch.float32


def test_compiled_as_one_graph():
    attention = LlamaAttention(CONFIG)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    args = inputs(150)
    torch.testing.assert_close(compiled(*args), attention(*args))


def test_padding_in_front_of_a_short_prompt_changes_nothing():
    """Rows of different lengths: positions and mask of their own."""
    attention = LlamaAttention(CONFIG)
    rope = LlamaRotaryEmbedding(CONFIG)
    x = torch.randn(2, 9, 48)
    padding = torch.tensor([4, 0])
    positions = (torch.arange(9) - padding[:, None]).clamp(min=0)
    real = torch.arange(9) >= padding[:, None]
    mask = causal_mask(9, 9) & real[:, None, None]
    y = attention(x, *rope(positions), mask)
    alone = attention(x[:1, 4:], *rope(torch.arange(5)))
    torch.testing.assert_close(y[:1, 4:], alone)


def test_built_on_the_meta_device_and_assigned():
    attention = LlamaAttention(CONFIG)
    with torch.device("meta"):
        other = LlamaAttention(CONFIG)
    other.load_state_dict(attention.state_dict(), assign=True)
    args = inputs(5)
    assert torch.equal(other(*args), attention(*args))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, S", [(300, 300), (1, 300), (7, 300)])
def test_on_a_gpu(T, S, dtype):
    """The same function as on a CPU, causal and with a mask."""
    q, k, v = (x.to(dtype) for x in heads(T, S))
    mask = causal_mask(T, S)
    expected = attend(q.float(), k.float(), v.float())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for given in (None, mask.cuda()):
        out = attend(q.cuda(), k.cuda(), v.cuda(), given).cpu().float()
        torch.testing.assert_close(
            out, expected, rtol=tolerance, atol=tolerance
        )


class JoiningCache:
    """Keys and values of one layer, joined at each update."""

    def __init__(self):
        self.pairs = []

    def update(self, k, v):
        self.pairs.append((k, v))
        return [torch.cat(x, dim=2) for x in zip(*self.pairs, strict=True)]


@pytest.mark.parametrize("pieces", [(150,), (1, 149), (100, 50), (75, 1, 74)])
def test_a_cache_changes_nothing(pieces):
    """A text read in pieces of any size gives what it gives at once."""
    attention, cache, outputs = LlamaAttention(CONFIG), JoiningCache(), []
    x, cos, sin = inputs(150)
    whole = attention(x, cos, sin)
    parts = zip(*(t.split(pieces, -2) for t in (x, cos, sin)), strict=True)
    for part in parts:
        outputs.append(attention(*part, cache=cache))
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
