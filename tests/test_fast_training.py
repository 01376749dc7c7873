"""Chapter 19's attention and loss: the same results as the plain ones, swapped in from outside."""

import copy

import pytest
import torch
from torch.nn import functional as F

from llama_tut.attention import LlamaAttention, attend, causal_mask
from llama_tut.config import LlamaConfig
from llama_tut.fast import training
from llama_tut.fast.training import (
    FusedOnGPU,
    blocked_attention,
    head_loss,
    speed_up,
    tile_size,
)
from llama_tut.model import LlamaForCausalLM, next_token_loss
from llama_tut.tools import memory
from llama_tut.tools.options import TrainConfig

B, H, K, C = 2, 6, 2, 8
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=H,
    num_key_value_heads=K,
    head_dim=C,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def heads(T, S, kv=K, **kwargs):
    """Random q [B, H, T, C], k and v [B, kv, S, C]."""
    shapes = (B, H, T, C), (B, kv, S, C), (B, kv, S, C)
    return [torch.randn(shape, **kwargs) for shape in shapes]


SIZES = [(1, 1), (1, 9), (5, 9), (33, 33), (130, 300), (257, 257)]


@pytest.mark.parametrize("kv", [1, 2, 6])
@pytest.mark.parametrize("T, S", SIZES)
def test_blocks_equal_plain_attention(T, S, kv):
    """Values and gradients, with one, some and all key heads."""
    inputs = heads(T, S, kv, requires_grad=True)
    seed = torch.randn(B, H, T, C)
    found = []
    for function in (blocked_attention, attend):
        out = function(*inputs)
        found.append([out, *torch.autograd.grad(out, inputs, seed)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [50, 4096, 9001, 40_000])
@pytest.mark.parametrize("half", [False, True])
def test_head_loss(vocab_size, half):
    """Tiles against the plain loss: more rows and words than one tile."""
    hidden = torch.randn(2, 300, 16)
    weight = 0.3 * torch.randn(vocab_size, 16)
    targets = torch.randint(0, vocab_size, (2, 300))
    targets[0, ::3] = -100
    found = []
    for function in (head_loss, next_token_loss):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = function(h, w, targets)
            with torch.no_grad():
                again = function(h, w, targets)
        (loss / 3).backward()
        torch.testing.assert_close(loss.detach(), again)
        found.append((loss.detach(), h.grad, w.grad))
    for ours, other in zip(*found, strict=True):
        error = (ours - other).abs().max() / other.abs().max()
        assert error < (1e-2 if half else 1e-5)


def test_head_loss_in_bfloat16_weights():
    """Sums over tiles are kept in float32; gradients come in the weight's dtype."""
    hidden = torch.randn(600, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5000, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 5000, (600,))
    loss = head_loss(hidden, weight, targets)
    loss.backward()
    exact = F.cross_entropy(hidden.float() @ weight.float().T, targets)
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
    h, w = (x.detach().float().requires_grad_() for x in (hidden, weight))
    F.cross_entropy(h @ w.T, targets).backward()
    for ours, right in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        error = (ours - right).abs().max() / right.abs().max()
        assert error < 1e-2


@pytest.mark.parametrize("vocab_size", [50, 9001])
def test_head_loss_is_one_node_of_a_compiled_graph(vocab_size):
    """fullgraph: the compiler neither breaks off nor writes out the loops."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(600, 16), torch.randn(vocab_size, 16)
    targets = torch.randint(0, vocab_size, (600,))
    compiled = torch.compile(head_loss, backend="aot_eager", fullgraph=True)
    found = []
    for function in (head_loss, compiled):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, targets)
        loss.backward()
        with torch.no_grad():
            again = function(h, w, targets)
        torch.testing.assert_close(loss.detach(), again)
        found.append((loss.detach(), h.grad, w.grad))
    torch.testing.assert_close(*found)


def test_head_loss_backward_twice_is_an_error():
    """The gradients are handed out in place, so a second time must not pass."""
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    loss = head_loss(hidden, weight, torch.arange(4))
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


class OnGPU(torch.Tensor):
    is_cuda = True


def test_a_function_is_compiled_on_a_gpu_only(monkeypatch):
    """Where the compiler fails there, the function stays as it is."""
    calls = []

    def compiled(function):
        calls.append(function)
        if len(calls) == 2:
            raise RuntimeError("no compiler")
        return lambda x: x + 2

    monkeypatch.setattr(torch, "compile", compiled)
    here, there = torch.zeros(1), torch.zeros(1).as_subclass(OnGPU)
    good, bad = (FusedOnGPU(lambda x: x + 1) for _ in range(2))
    assert good(here) == 1 and good(there) == good(there) == 2
    with pytest.warns(UserWarning, match="not compiled: no compiler"):
        assert bad(there) == 1
    assert bad(there) == 1 and len(calls) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocab_size", [1, 4096, 4097, 50_304, 128_256])
def test_all_tiles_are_equally_wide(vocab_size, device):
    """The last tile is reused, so a short one would cost a whole product."""
    rows, words, keep = tile_size(vocab_size, torch.device(device))
    tiles = -(-vocab_size // words)
    assert words * tiles - vocab_size < tiles
    assert words <= (16_384 if device == "cuda" else 1024)
    assert keep == (tiles if device == "cpu" and vocab_size < 32_769 else 1)
    assert keep == 1 or 4 * rows * vocab_size <= 2**26


def text():
    ids = torch.randint(0, CONFIG.vocab_size, (2, 41))
    targets = ids[:, 1:].clone()
    targets[0, 3:9] = -100
    return ids[:, :-1], targets


def loss_and_gradients(run, model, ids, targets):
    """Of `run`, which is `model` or its compiled form."""
    loss = run(ids, targets=targets)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_fast_model_computes_the_same(tied, autocast, compiled):
    """Loss and every gradient, as trained: autocast, compiled, or neither."""
    torch._dynamo.reset()
    plain = LlamaForCausalLM(
        LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    )
    fast = speed_up(copy.deepcopy(plain), dtype=torch.bfloat16)
    assert fast.compute_loss is training.tiles_if_eager
    if compiled:
        fast.compute_loss = head_loss  # as a very large vocabulary has it
    assert fast.model.layers[1].self_attn.attend is blocked_attention
    run = fast
    if compiled:
        run = torch.compile(fast, backend="aot_eager", fullgraph=True)
    ids, targets = text()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = loss_and_gradients(plain, plain, ids, targets)
        found = loss_and_gradients(run, fast, ids, targets)
    for ours, other in zip(found, expected, strict=True):
        error = (ours - other).norm() / other.norm()
        assert error < (3e-2 if autocast else 1e-4)


class JoiningCache:
    """Keys and values of one layer, joined at each update."""

    def __init__(self):
        self.pairs = []

    @property
    def length(self):
        return sum(k.shape[2] for k, _ in self.pairs)

    def update(self, k, v):
        self.pairs.append((k, v))
        return [torch.cat(x, dim=2) for x in zip(*self.pairs, strict=True)]


def test_a_fast_model_with_a_cache_and_with_padding():
    """In bfloat16: pieces of a text, and rows with padding in front."""
    plain = LlamaForCausalLM(CONFIG).bfloat16()
    fast = speed_up(copy.deepcopy(plain))
    assert fast.compute_loss is training.tiles_if_eager
    ids, _ = text()
    with torch.no_grad():
        whole = plain(ids)
        cache = [JoiningCache() for _ in range(2)]
        pieces = [
            fast(part, cache=cache) for part in ids.split((20, 1, 19), 1)
        ]
        torch.testing.assert_close(
            torch.cat(pieces, 1), whole, rtol=0.05, atol=0.05
        )
        real = torch.ones(2, 40, dtype=torch.bool)
        real[0, :7] = False
        mask = real[:, None, None, :] & causal_mask(40, 40)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        how = {"position_ids": positions, "attention_mask": mask}
        torch.testing.assert_close(
            fast(ids, **how)[real],
            plain(ids, **how)[real],
            rtol=0.05,
            atol=0.05,
        )


def swapped(model):
    """Names of what is not the plain version."""
    names = set()
    if model.compute_loss is not next_token_loss:
        names.add("loss")
    for module in model.modules():
        if isinstance(module, LlamaAttention) and module.attend is not attend:
            names.add("attention")
    return names


@pytest.mark.parametrize(
    "device, dtype, vocab_size, expected",
    [
        (None, None, 97, {"loss"}),
        ("cpu", torch.float32, 97, {"loss"}),
        ("cpu", torch.bfloat16, 97, {"loss", "attention"}),
        ("cuda", torch.bfloat16, 97, {"loss"}),
        ("cuda", torch.float32, 128_256, {"loss"}),
        ("cuda", torch.bfloat16, 128_256, {"loss"}),
        ("mps", torch.bfloat16, 128_256, set()),
    ],
)
def test_what_is_swapped_where(device, dtype, vocab_size, expected):
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(**{**vars(CONFIG), "vocab_size": vocab_size})
        )
    if device is None:
        model = LlamaForCausalLM(CONFIG)
    state = list(model.state_dict())
    assert speed_up(model, device=device, dtype=dtype) is model
    assert swapped(model) == expected
    assert list(model.state_dict()) == state


def test_compiled_on_a_cpu_the_loss_is_the_plain_one():
    """The compiled graph has no tiles, unless the vocabulary is very large."""
    torch._dynamo.reset()
    operations = set()

    def look(graph, _):
        operations.update(str(node.target) for node in graph.graph.nodes)
        return graph

    for vocab_size, tiles in ((97, False), (65_537, True)):
        operations.clear()
        config = LlamaConfig(**{**vars(CONFIG), "vocab_size": vocab_size})
        model = speed_up(LlamaForCausalLM(config))
        ids, targets = text()
        found = torch.compile(model, backend=look)(ids, targets=targets)
        names = " ".join(operations)
        assert ("cross_entropy" not in names) == tiles
        torch.testing.assert_close(found, model(ids, targets=targets))


def test_the_memory_plan_knows_the_tiles():
    """Its numbers stand there once more, since it may not import chapter 19."""
    assert memory.LARGE_VOCABULARY == training.LARGE_VOCABULARY
    config = TrainConfig(sequence_length=2048, micro_batch_size=8)
    for vocab_size in (4096, 32_768, 32_769, 128_256):
        llama = LlamaConfig(vocab_size, 64, 96, 1, 2)
        with torch.device("meta"):
            model = LlamaForCausalLM(llama)
        device = torch.device("cpu")
        found = memory.plan(config, model, device, torch.float32)["logits"]
        rows, words, keep = tile_size(vocab_size, device)
        kept = 4 * rows * vocab_size if keep > 1 else 0
        right = 4 * vocab_size * 64 + kept + 3 * 4 * rows * words
        assert right <= found < 1.05 * right


def test_one_fast_model_leaves_the_others_alone():
    speed_up(LlamaForCausalLM(CONFIG), dtype=torch.bfloat16)
    assert not swapped(LlamaForCausalLM(CONFIG))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocab_size", [50_304, 128_256])
def test_head_loss_on_cuda(vocab_size):
    """Several tiles across and down, compiled as one graph."""
    hidden = torch.randn(5000, 64, device="cuda")
    weight = 0.1 * torch.randn(vocab_size, 64, device="cuda")
    targets = torch.randint(0, vocab_size, (5000,), device="cuda")
    found = []
    for function in (
        next_token_loss,
        head_loss,
        torch.compile(head_loss, fullgraph=True),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, targets)
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-5)
