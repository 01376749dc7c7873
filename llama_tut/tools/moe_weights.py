"""Mixtures of experts as transformers stores them: config.json and tensors.

Mixtral has a format of its own. A LLaMA with DeepSeek-V3's experts is stored
as GLM-4.5 (`glm4_moe`), whose attention can be that of a LLaMA.
"""

import re
from dataclasses import fields

import torch

from llama_tut.config import LlamaConfig, check_number, read_hf
from llama_tut.tools.files import require
from llama_tut.tools.safetensors_folder import Stored, tensor_table

MIXTRAL = {
    "num_local_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "expert_size",
}
GLM4 = {
    "n_routed_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_size",
    "n_shared_experts": "shared_experts",
    "n_group": "expert_groups",
    "topk_group": "open_groups",
    "routed_scaling_factor": "routed_scale",
    "first_k_dense_replace": "dense_layers",
}
BUILT = {
    "norm_topk_prob": True,
    "use_qk_norm": False,
    "router_jitter_noise": 0.0,
}


def read_moe(hf):
    """The fields of a MoEConfig from the dictionary of a config.json.

    Raises:
        InputError: it asks for something that is not built here.
    """
    kind = hf.get("model_type")
    require(
        kind in ("mixtral", "glm4_moe"),
        f"config has model_type = {kind!r}, whose attention is not built here "
        "(DeepSeek-V3's is multi-head latent attention): chapter 26 reads its "
        "expert layers alone",
    )
    for name, built in BUILT.items():
        value = hf.get(name, built)
        require(
            value == built,
            f"config has {name} = {value!r}; this book builds only {built!r}",
        )
    names = MIXTRAL if kind == "mixtral" else GLM4
    sizes = ("num_experts_per_tok", "num_hidden_layers", "intermediate_size")
    missing = sorted((names.keys() | set(sizes)) - hf.keys())
    require(not missing, f"config lacks {', '.join(missing)}")
    for name in sizes:
        check_number(f"config's {name}", hf[name], whole=True)
    own = {ours: hf[theirs] for theirs, ours in names.items()}
    if kind == "mixtral":
        k, L = hf["num_experts_per_tok"], hf["num_hidden_layers"]
        own["balance"] = hf.get("router_aux_loss_coef", 0.001) * k / L
        hf = hf | {"intermediate_size": k * hf["intermediate_size"]}
    else:
        rope = hf.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor", 0.5)
        share = hf.get("partial_rotary_factor", share)
        require(share == 1, f"config has partial_rotary_factor = {share}")
    mlp = "mixtral" if kind == "mixtral" else "deepseek"
    return read_hf(hf | {"model_type": "llama"}) | {"mlp": mlp, **own}


def write_moe(config, hf):
    """A config.json from a MoEConfig and what its LLaMA would write."""
    c, mixtral = config, config.mlp == "mixtral"
    ours = {f.name for f in fields(c)} - {f.name for f in fields(LlamaConfig)}
    hf = {name: value for name, value in hf.items() if name not in ours}
    names = MIXTRAL if mixtral else GLM4
    hf |= {theirs: getattr(c, ours) for theirs, ours in names.items()}
    if mixtral:
        # transformers pools the layers, and its perfect balance is k.
        scale = c.num_hidden_layers / c.experts_per_token
        return hf | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "router_aux_loss_coef": c.balance * scale,
            "sliding_window": None,
        }
    return hf | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


# Mixtral's files call the three matrices w1, w3 and w2.
LETTERS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def stack_experts(tensors):
    """{name in a file: tensor} -> {name here: tensor}, experts stacked.

    Raises:
        InputError: an expert is missing, or has another shape.
    """
    found, stacks = {}, {}
    for name, tensor in tensors.items():
        ours = name.replace(".block_sparse_moe.", ".mlp.")
        for word, letters in LETTERS.items():
            ours = ours.replace(f".{letters}.", f".{word}.")
        match = EXPERT.fullmatch(ours)
        if match:
            place, e, word = match.groups()
            stacks.setdefault(f"{place}.{word}", {})[int(e)] = tensor
        else:
            found[ours] = tensor
    for name, experts in stacks.items():
        for e in range(len(experts)):
            require(e in experts, f"the checkpoint lacks expert {e} of {name}")
            require(
                experts[e].shape == experts[0].shape,
                f"{name}: experts 0 and {e} have different shapes",
            )
        found[name] = torch.stack([experts[e] for e in range(len(experts))])
    return found


def stacked_table(folder):
    """{name here: Stored} of a folder's tensors, experts stacked."""
    table = tensor_table(folder)
    tensors = stack_experts({name: s.tensor for name, s in table.items()})
    return {name: Stored(t, None, 0) for name, t in tensors.items()}


def fill(module, table, dtype=None, device="cpu"):
    """Give a module on the device meta the tensors of these names.

    A buffer that no file holds, such as `load`, starts at 0.
    """
    state = module.state_dict()
    missing = [name for name in state if name not in table]
    require(not missing, f"the checkpoint lacks {', '.join(missing)}")
    for name in state:
        # In bfloat16 a bias would lose its nudges of 0.001.
        kind = torch.float32 if name.endswith("_bias") else dtype
        state[name] = table[name].tensor.to(device, kind)
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.zeros(buffer.shape, device=device))
    return module


def unstack_experts(state, mixtral):
    """The way back: a state dict -> {name in a file: tensor}."""
    found = {}
    for name, tensor in state.items():
        if ".mlp.experts." not in name:
            theirs = name.replace(".mlp.", ".block_sparse_moe.")
            found[theirs if mixtral else name] = tensor
            continue
        place, word = name.rsplit(".", 1)
        if mixtral:
            place = place.replace(".mlp.", ".block_sparse_moe.")
            word = LETTERS[word]
        for e, expert in enumerate(tensor.unbind()):
            found[f"{place}.{e}.{word}.weight"] = expert
    return found
