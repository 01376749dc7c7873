"""GPT-2's weights of transformers under our names, and the variants that we build."""

from llama_tut.tools.files import require

NAMES = {
    "wte": "embed_tokens",
    "wpe.weight": "embed_tokens.positions",
    "ln_f": "norm",
    "h.": "layers.",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
BUILT = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def rename_gpt2(name):
    """A name in transformers' GPT-2 -> the name in our model."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("transformer.", "model.")


def check_gpt2(config):
    """Refuse a variant that is not built here. Raises: InputError."""
    for name, built in BUILT.items():
        found = getattr(config, name)
        require(
            found == built,
            f"config has {name} = {found!r}; this book builds only {built!r}",
        )


def translate_gpt2(state):
    """transformers' state dict of a GPT-2 -> ours."""
    ours = {}
    for name, w in state.items():
        if name.endswith((".attn.bias", ".masked_bias", "lm_head.weight")):
            continue  # masks of old versions, and the embedding again
        if ".c_" in name and name.endswith("weight"):
            w = w.T  # stored as [inputs, outputs]
        if ".c_attn." in name:
            for letter, piece in zip("qkv", w.chunk(3), strict=True):
                own = name.replace("attn.c_attn", f"self_attn.{letter}_proj")
                ours[rename_gpt2(own)] = piece
        else:
            ours[rename_gpt2(name)] = w
    return ours
