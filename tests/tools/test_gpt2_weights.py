"""GPT-2's weights under our names."""

import torch

from llama_tut.tools.gpt2_weights import rename_gpt2, translate_gpt2


def test_names_and_layout():
    assert rename_gpt2("transformer.ln_f.bias") == "model.norm.bias"
    qkv = torch.arange(18.0).view(3, 6).T.reshape(2, 9)
    ours = translate_gpt2(
        {
            "transformer.h.0.attn.c_attn.weight": qkv,
            "transformer.h.0.attn.bias": torch.ones(1),
            "lm_head.weight": torch.ones(1),
        }
    )
    start = "model.layers.0.self_attn."
    assert set(ours) == {f"{start}{x}_proj.weight" for x in "qkv"}
    torch.testing.assert_close(ours[f"{start}k_proj.weight"], qkv.T[3:6])
