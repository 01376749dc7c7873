"""Checkers of chapter 7."""

import torch

from llama_tut.block import LlamaDecoderLayer
from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.rope import LlamaRotaryEmbedding


def small_block():
    """A block whose gains differ, its tables, and an input [2, 5, 16]."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2
    )
    block = LlamaDecoderLayer(config)
    for p in block.parameters():
        torch.nn.init.uniform_(p, 0.2, 0.8)
    cos, sin = LlamaRotaryEmbedding(config)(torch.arange(5))
    return block, torch.randn(2, 5, 16), cos, sin


@exercise("block.block")
@torch.no_grad()
def check_block(answer):
    """The forward pass of a block, against the class."""
    block, x, cos, sin = small_block()
    found = answer(block, x.clone(), cos, sin)
    expect(
        torch.is_tensor(found) and found.shape == x.shape,
        "return a tensor like x, [B, T, D]",
    )
    cases = {
        replaced: "each branch is added to x, it does not replace x",
        one_residual: "the MLP has a residual of its own",
        forgot_attention: "attention's output must be added before the MLP "
        "reads",
        norm_on_the_stream: "the norm stands inside the branch: the stream "
        "itself is never normalised",
        norm_after: "the norms stand before attention and MLP, not after the "
        "sum",
        no_norms: "each branch reads through a norm",
        swapped_norms: "input_layernorm belongs to attention, "
        "post_attention_layernorm to the MLP",
        one_norm_twice: "the MLP reads through post_attention_layernorm",
        parallel: "the MLP reads the sum x + attention, not x",
        mlp_first: "attention comes first, then the MLP",
    }
    for case, hint in cases.items():
        same = torch.allclose(found, case(block, x, cos, sin), rtol=1e-5)
        expect(not same, hint)
    expect_close(
        found, block(x, cos, sin), "it is not the block's output", 1e-4
    )
    torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    torch.nn.init.zeros_(block.mlp.down_proj.weight)
    expect(
        torch.equal(answer(block, x.clone(), cos, sin), x),
        "with zero output matrices the block must hand on x",
    )


@wrong("block.block", "does not replace")
def replaced(block, x, cos, sin):
    x = block.self_attn(block.input_layernorm(x), cos, sin)
    return block.mlp(block.post_attention_layernorm(x))


@wrong("block.block", "a residual of its own")
def one_residual(block, x, cos, sin):
    x = x + block.self_attn(block.input_layernorm(x), cos, sin)
    return block.mlp(block.post_attention_layernorm(x))


@wrong("block.block", "before the MLP")
def forgot_attention(block, x, cos, sin):
    return x + block.mlp(block.post_attention_layernorm(x))


@wrong("block.block", "never normalised")
def norm_on_the_stream(block, x, cos, sin):
    x = block.input_layernorm(x)
    x = x + block.self_attn(x, cos, sin)
    x = block.post_attention_layernorm(x)
    return x + block.mlp(x)


@wrong("block.block", "not after the")
def norm_after(block, x, cos, sin):
    x = block.input_layernorm(x + block.self_attn(x, cos, sin))
    return block.post_attention_layernorm(x + block.mlp(x))


@wrong("block.block", "through a norm")
def no_norms(block, x, cos, sin):
    x = x + block.self_attn(x, cos, sin)
    return x + block.mlp(x)


@wrong("block.block", "belongs to attention")
def swapped_norms(block, x, cos, sin):
    x = x + block.self_attn(block.post_attention_layernorm(x), cos, sin)
    return x + block.mlp(block.input_layernorm(x))


@wrong("block.block", "through post_attention_layernorm")
def one_norm_twice(block, x, cos, sin):
    x = x + block.self_attn(block.input_layernorm(x), cos, sin)
    return x + block.mlp(block.input_layernorm(x))


@wrong("block.block", "not x")
def parallel(block, x, cos, sin):
    read = block.self_attn(block.input_layernorm(x), cos, sin)
    return x + read + block.mlp(block.post_attention_layernorm(x))


@wrong("block.block", "attention comes first")
def mlp_first(block, x, cos, sin):
    x = x + block.mlp(block.post_attention_layernorm(x))
    return x + block.self_attn(block.input_layernorm(x), cos, sin)


@exercise("block.derivative")
def check_derivative(answer):
    """A chain of residual layers, one of them cut."""
    found = answer(30, 0.1)
    hints = {
        0.1**30: "only one of the layers has lost its residual",
        1.1**30: "this is the whole chain: one residual is cut",
        1.1**29: "the cut layer still multiplies, by w",
        1.1**30 - 0.1: "derivatives of a chain are multiplied",
    }
    for value, hint in hints.items():
        expect(abs(found / value - 1) > 1e-9, hint)
    expect_close(
        found, 1.1**29 * 0.1, "each layer gives one factor: w or 1 + w"
    )
    expect_close(answer(3, 2.0), 18.0, "for L = 3 and w = 2 it is 18")


@wrong("block.derivative", "only one of the layers")
def no_residuals(L, w):
    return w**L


@wrong("block.derivative", "still multiplies")
def skipped(L, w):
    return (1 + w) ** (L - 1)


@wrong("block.derivative", "the whole chain")
def nothing_cut(L, w):
    return (1 + w) ** L


@exercise("block.rms")
def check_rms(answer):
    """The RMS of the stream after L random blocks."""
    found = answer(2.0, 8, 1.0, 3.0, False)
    expect(
        abs(found - 34) > 1e-6 and abs(found - (2 + 8 * (1 + 3**0.5))) > 1e-6,
        "orthogonal vectors: their squares add up, not their lengths",
    )
    expect(
        abs(found - 32**0.5) > 1e-6, "the stream does not start from nothing"
    )
    expect(abs(found - 36) > 1e-6, "the RMS is the root of the mean square")
    expect_close(found, 6.0, "compare with sqrt(start^2 + L (a + m))")
    found = answer(2.0, 8, 1.0, 3.0, True)
    expect(
        abs(found - 6 / 4) > 1e-6,
        "the embedding is not scaled, only what the blocks add",
    )
    expect(
        abs(found - (4 + 32 / 4) ** 0.5) > 1e-6,
        "a factor on a matrix counts squared in a mean square",
    )
    expect_close(found, 6**0.5, "scaled, the blocks add (a + m) / 2 together")


@wrong("block.rms", "squares add up")
def lengths_add(start, L, a, m, scaled):
    return start + L * (a**0.5 + m**0.5)


@wrong("block.rms", "start from nothing")
def no_start(start, L, a, m, scaled):
    return (L * (a + m)) ** 0.5


@wrong("block.rms", "counts squared")
def factor_not_squared(start, L, a, m, scaled):
    added = L * (a + m)
    return (start**2 + (added / (2 * L) ** 0.5 if scaled else added)) ** 0.5


@wrong("block.rms", "the embedding is not scaled")
def all_scaled(start, L, a, m, scaled):
    rms = (start**2 + L * (a + m)) ** 0.5
    return rms / (2 * L) ** 0.5 if scaled else rms


@exercise("block.parallel")
def check_parallel(answer):
    """Attention and MLP side by side."""
    block, x, cos, sin = small_block()
    cases = {
        sequential: "the MLP must read x, not what attention made of it",
        normed_residual: "the residual is x itself, not its norm",
        residual_twice: "x is added once",
        one_norm: "this is GPT-J's block: here attention and MLP each have a "
        "norm of their own",
    }
    with torch.no_grad():
        found = answer(block, x.clone(), cos, sin)
        for case, hint in cases.items():
            same = torch.allclose(found, case(block, x, cos, sin), rtol=1e-5)
            expect(not same, hint)
        wanted = parallel(block, x, cos, sin)
    expect_close(
        found,
        wanted,
        "compare with x + attention(norm1(x)) + mlp(norm2(x))",
        1e-4,
    )


@wrong("block.parallel", "the MLP must read x")
def sequential(block, x, cos, sin):
    x = x + block.self_attn(block.input_layernorm(x), cos, sin)
    return x + block.mlp(block.post_attention_layernorm(x))


@wrong("block.parallel", "not its norm")
def normed_residual(block, x, cos, sin):
    normed = block.input_layernorm(x)
    read = block.self_attn(normed, cos, sin)
    return normed + read + block.mlp(block.post_attention_layernorm(x))


@wrong("block.parallel", "added once")
def residual_twice(block, x, cos, sin):
    read = x + block.self_attn(block.input_layernorm(x), cos, sin)
    return read + x + block.mlp(block.post_attention_layernorm(x))


@wrong("block.parallel", "a norm of their own")
def one_norm(block, x, cos, sin):
    normed = block.input_layernorm(x)
    return x + block.self_attn(normed, cos, sin) + block.mlp(normed)


@wrong("block.parallel", "compare with")
def without_mlp(block, x, cos, sin):
    return x + block.self_attn(block.input_layernorm(x), cos, sin)


@wrong("block.derivative", "are multiplied")
def subtracted(L, w):
    return (1 + w) ** L - w


@wrong("block.rms", "root of the mean square")
def not_rooted(start, L, a, m, scaled):
    return start**2 + L * (a + m)
