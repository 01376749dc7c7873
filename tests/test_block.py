"""The block: its initialisation, its identity, its masks and caches."""

import pytest
import torch

from llama_tut.block import LlamaDecoderLayer
from llama_tut.config import LlamaConfig
from llama_tut.rope import LlamaRotaryEmbedding

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TABLES = LlamaRotaryEmbedding(CONFIG)(torch.arange(12))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_zero_output_matrices_make_the_identity():
    block = LlamaDecoderLayer(CONFIG)
    block.init_weights(std=0.1, output_std=0.0)
    x = torch.randn(2, 12, 64)
    assert torch.equal(block(x, *TABLES), x)


@pytest.mark.parametrize("silent", ["self_attn.o_proj", "mlp.down_proj"])
def test_each_branch_adds_by_itself(silent):
    """With one branch silenced the other still reads its own norm."""
    block = LlamaDecoderLayer(CONFIG)
    torch.nn.init.zeros_(block.get_submodule(silent).weight)
    x = torch.randn(2, 12, 64)
    if silent.startswith("mlp"):
        added = block.self_attn(block.input_layernorm(x), *TABLES)
    else:
        added = block.mlp(block.post_attention_layernorm(x))
    torch.testing.assert_close(block(x, *TABLES), x + added)


def test_init_weights_reaches_every_part():
    """`output_std` is for the two matrices that write, and no other."""
    block = LlamaDecoderLayer(CONFIG)
    with torch.no_grad():
        for p in block.parameters():
            p.fill_(7.0)
    block.init_weights(std=0.5, output_std=0.1)
    for name, p in block.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
            continue
        writes = name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
        expected = 0.1 if writes else 0.5
        assert abs(p.std() / expected - 1) < 4 / p.numel() ** 0.5, name
        assert abs(p.mean() / expected) < 5 / p.numel() ** 0.5, name


def test_compiled_as_one_graph():
    block = LlamaDecoderLayer(CONFIG)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 12, 64)
    torch.testing.assert_close(compiled(x, *TABLES), block(x, *TABLES))
