"""Mixture of experts: many MLPs, of which each token uses a few.

Letters: B batch, T time, N = B*T tokens, D hidden_size, L layers, E experts,
k experts of a token, I width of an expert, R = N*k rows.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.config import LlamaConfig, check_number, option, read_hf
from llama_tut.mlp import LlamaMLP
from llama_tut.model import LlamaForCausalLM, flops_per_token
from llama_tut.tools.files import require
from llama_tut.tools.options import check_choices
from llama_tut.tools.ranks import mean_over_ranks

# Two routers


def route_mixtral(logits, k):
    """Softmax over all experts, the k largest, renormalised.

    Args:
        logits: one number for each token and expert, [N, E].

    Returns:
        scores [N, E] that sum to 1, chosen experts [N, k], weights [N, k].
    """
    scores = logits.softmax(-1)  # [N, E]
    weights, chosen = scores.topk(k, -1)  # [N, k], [N, k]
    return scores, chosen, weights / weights.sum(-1, keepdim=True)


def route_deepseek(logits, bias, k, groups=1, open_groups=1, scale=1.0):
    """Sigmoids; a bias helps to choose, but is not in the weights.

    Args:
        logits: [N, E].
        bias: one number for each expert, [E].
        groups, open_groups: experts stand in so many groups, of which a token
            uses so many: those whose two best experts have the largest sum.
        scale: what the k weights sum to.

    Returns:
        scores [N, E] between 0 and 1, chosen [N, k], weights [N, k].
    """
    scores = logits.sigmoid()  # [N, E]
    choice = scores + bias  # [N, E]
    if groups > 1:
        parts = choice.unflatten(-1, (groups, -1))  # [N, groups, E/groups]
        best = parts.topk(2, -1).values.sum(-1)  # [N, groups]
        kept = best.topk(open_groups, -1).indices  # [N, open_groups]
        shut = torch.ones_like(best).scatter(-1, kept, 0).bool()
        choice = parts.masked_fill(shut[..., None], -torch.inf).flatten(1)
    chosen = choice.topk(k, -1).indices  # [N, k]
    weights = scores.gather(-1, chosen)  # [N, k]
    return scores, chosen, scale * weights / weights.sum(-1, keepdim=True)


# The config


@dataclass(frozen=True)
class MoEConfig(LlamaConfig):
    """A LLaMA whose MLPs are mixtures of experts.

    Raises:
        InputError: these numbers do not make a model that can be built.
    """

    mlp: Literal["mixtral", "deepseek"] = option("mixtral", "which router")
    experts: int = option(8, "E, experts of a layer")
    experts_per_token: int = option(2, "k, experts that a token uses")
    expert_size: int | None = option(None, "I of an expert (None: I/(k+s))")
    shared_experts: int = option(0, "s, experts that every token uses")
    expert_groups: int = option(1, "groups of experts")
    open_groups: int = option(1, "groups that a token may use")
    routed_scale: float = option(1.0, "what the k weights sum to")
    dense_layers: int = option(0, "first layers that keep a dense MLP")
    balance: float | None = option(None, "strength of balancing")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        one_token = self.experts_per_token + self.shared_experts
        if self.expert_size is None:
            I = self.intermediate_size
            require(
                I % one_token == 0,
                f"--intermediate-size {I} is not a multiple of the "
                f"{one_token} experts of a token: change it, or give "
                "--expert-size",
            )
            object.__setattr__(self, "expert_size", I // one_token)
        if self.balance is None:
            value = 0.01 if self.mlp == "mixtral" else 0.001
            object.__setattr__(self, "balance", value)
        check_moe(self)

    @classmethod
    def from_hf(cls, hf):
        """Read a transformers config or the dictionary of a config.json."""
        return cls(**read_moe(hf if isinstance(hf, dict) else hf.to_dict()))

    def to_hf(self):
        """A config.json of Mixtral, or of GLM-4.5: DeepSeek's experts beside
        an attention like LLaMA's."""
        return write_moe(self, super().to_hf())


def check_moe(c):
    """Refuse, by name, numbers of a MoEConfig that do not fit."""
    E, k, G = c.experts, c.experts_per_token, c.expert_groups
    for name in "experts experts_per_token expert_size expert_groups".split():
        check_number(name, getattr(c, name), whole=True)
    require(k <= E, f"--experts-per-token {k} is more than --experts {E}")
    require(E % G == 0, f"--experts {E} is not a multiple of {G} groups")
    open_ = c.open_groups
    require(1 <= open_ <= G, f"--open-groups {open_}: there are {G} groups")
    require(G == 1 or E // G > 1, f"{G} groups of one expert: give fewer")
    room = E // G * open_
    require(k <= room, f"--experts-per-token {k}: {open_} groups have {room}")
    plain = c.shared_experts == 0 and G == 1 and c.routed_scale == 1
    plain = plain and c.dense_layers == 0
    require(
        c.mlp == "deepseek" or plain,
        "Mixtral has no shared experts, groups, scale or dense layers: take "
        "--mlp deepseek",
    )
    low = min(c.shared_experts, c.dense_layers, c.balance)
    require(low >= 0, "shared experts, dense layers, balance: none below 0")
    require(c.routed_scale > 0, f"--routed-scale {c.routed_scale}")


# Names in a config.json

MIXTRAL = {"num_local_experts": "experts"}
MIXTRAL |= {"num_experts_per_tok": "experts_per_token"}
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
BUILT = {"norm_topk_prob": True, "use_qk_norm": False, "kv_lora_rank": None}
BUILT |= {"num_nextn_predict_layers": 0, "router_jitter_noise": 0.0}


def read_moe(hf):
    """The fields of a MoEConfig from the dictionary of a config.json."""
    kind = hf.get("model_type")
    require(
        kind != "deepseek_v3",
        "config has model_type 'deepseek_v3': its multi-head latent attention "
        "is not built; read_experts reads its expert layers",
    )
    for name, built in BUILT.items():
        require(
            hf.get(name, built) == built,
            f"config has {name} = {hf.get(name)!r}; only {built!r} is built",
        )
    llama = read_hf(hf | {"model_type": "llama"})
    if kind == "mixtral":
        I, k = hf["intermediate_size"], hf.get("num_experts_per_tok", 2)
        own = {ours: hf[n] for n, ours in MIXTRAL.items() if n in hf}
        own |= {"expert_size": I, "intermediate_size": k * I}
        share = k / llama["num_hidden_layers"]
        own["balance"] = hf.get("router_aux_loss_coef", 0.001) * share
    else:
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        turned = hf.get("partial_rotary_factor") or rope.get(
            "partial_rotary_factor", 0.5
        )
        require(turned == 1, f"config has partial_rotary_factor = {turned}")
        own = {ours: hf[n] for n, ours in GLM4.items() if n in hf}
    mlp = "mixtral" if kind == "mixtral" else "deepseek"
    return {**llama, "mlp": mlp, **own}


def write_moe(c, hf):
    """The dictionary of a config.json from that of the plain LLaMA."""
    own = {f.name for f in fields(MoEConfig)}
    own -= {f.name for f in fields(LlamaConfig)}
    hf = {name: value for name, value in hf.items() if name not in own}
    if c.mlp == "mixtral":
        # transformers pools the layers, and its perfect balance is k.
        coefficient = c.balance * c.num_hidden_layers / c.experts_per_token
        return hf | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **{name: getattr(c, ours) for name, ours in MIXTRAL.items()},
            "intermediate_size": c.expert_size,
            "router_aux_loss_coef": coefficient,
            "sliding_window": None,
        }
    return hf | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **{name: getattr(c, ours) for name, ours in GLM4.items()},
        "partial_rotary_factor": 1.0,
        "use_qk_norm": False,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    }


# The layer


class Router(nn.Module):
    """Scores experts, and picks k for each token; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__()
        E, D = config.experts, config.hidden_size
        self.config = config
        self.weight = nn.Parameter(torch.empty(E, D))
        if config.mlp == "deepseek":
            self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def init_weights(self, std, output_std=None, generator=None):
        """Draw the matrix from N(0, std^2); the bias starts at 0."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        for bias in self.buffers():
            bias.zero_()

    def forward(self, x):
        """x [N, D] -> scores [N, E], chosen [N, k], weights [N, k]."""
        c, k = self.config, self.config.experts_per_token
        # In float32: a rounded logit can choose another expert.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # [N, E]
        if c.mlp == "mixtral":
            return route_mixtral(logits, k)
        bias, more = self.e_score_correction_bias, c.routed_scale
        return route_deepseek(
            logits, bias, k, c.expert_groups, c.open_groups, more
        )


class Experts(nn.Module):
    """E MLPs of chapter 6 in three stacks; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__()
        c, D, I = config, config.hidden_size, config.expert_size
        self.gate_proj = nn.Parameter(torch.empty(c.experts, I, D))
        self.up_proj = nn.Parameter(torch.empty(c.experts, I, D))
        self.down_proj = nn.Parameter(torch.empty(c.experts, D, I))

    def init_weights(self, std, output_std, generator=None):
        """Draw from N(0, std^2); `down_proj` writes and has `output_std`."""
        stds = std, std, output_std
        for stack, s in zip(self.parameters(), stds, strict=True):
            nn.init.normal_(stack, std=s, generator=generator)

    def loop(self, x, chosen, weights):
        """x [N, D], chosen and weights [N, k] -> [N, D], expert by expert."""
        out = torch.zeros_like(x)  # [N, D]
        stacks = (stack.unbind() for stack in self.parameters())
        for e, (gate, up, down) in enumerate(zip(*stacks, strict=True)):
            token, place = torch.where(chosen == e)  # who chose this one
            rows = x[token]  # [n, D]
            hidden = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
            y = F.linear(hidden, down) * weights[token, place, None]  # [n, D]
            out = out.index_add(0, token, y.to(out.dtype))
        return out

    def forward(self, x, chosen, weights):
        """As `loop`, with all experts in one product of sorted rows."""
        order = chosen.flatten().argsort(stable=True)  # [R], by expert
        token = order // chosen.shape[1]  # [R], whose row it is
        load = count_tokens(chosen, len(self.gate_proj))  # [E]
        y = self.grouped(x[token], load)  # [R, D]
        y = y * weights.flatten()[order, None]  # [R, D]
        return torch.zeros_like(x).index_add(0, token, y.to(x.dtype))

    def grouped(self, rows, load):
        """Rows sorted by expert, [R, D], and how many each gets, [E]."""
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        ends = load.cumsum(0).to(torch.int32)  # [E]
        gate, up, down = (p.to(dtype).mT for p in self.parameters())
        multiply = partial(grouped_product, load=load, ends=ends)
        rows = rows.to(dtype)  # [R, D]
        hidden = F.silu(multiply(rows, gate)) * multiply(rows, up)  # [R, I]
        return multiply(hidden, down)  # [R, D]


def count_tokens(chosen, E):
    """chosen [N, k] -> how many tokens chose each expert, [E]."""
    return F.one_hot(chosen, E).sum((0, 1))  # [E]


def grouped_product(rows, stack, load, ends):
    """Rows [R, a] sorted by expert, times stack [E, a, b] -> [R, b]."""
    aligned = min(rows.shape[1], stack.shape[2]) * rows.itemsize % 16 == 0
    aligned = aligned and rows.shape[1] * rows.itemsize % 16 == 0
    if aligned and hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows, stack, offs=ends)  # [R, b]
    pieces = rows.split(load.tolist())
    pairs = zip(pieces, stack.unbind(), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pairs])  # [R, b]


class MoE(nn.Module):
    """Takes the place of a `LlamaMLP`; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__()
        E, s = config.experts, config.shared_experts
        self.gate, self.experts = Router(config), Experts(config)
        self.shared_experts = None
        if s:
            self.shared_experts = LlamaMLP(
                LlamaConfig(
                    hidden_size=config.hidden_size,
                    intermediate_size=s * config.expert_size,
                    num_attention_heads=config.num_attention_heads,
                )
            )
        # tokens of this step, and of the last forward pass
        self.register_buffer("load", torch.zeros(E), persistent=False)

    def init_weights(self, std, output_std, generator=None):
        """Draw router, experts and shared experts."""
        for part in filter(None, self.children()):
            part.init_weights(std, output_std, generator)

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]."""
        flat = x.flatten(0, -2)  # [N, D]
        scores, chosen, weights = self.gate(flat)
        out = self.experts(flat, chosen, weights).view_as(x)  # [B, T, D]
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        # Kept, not added up: a recomputed pass overwrites it.
        self.latest = scores, chosen
        return out


# Balance


def balance_term(scores, chosen):
    """E * sum of f * P: 1 when perfect (Fedus, 2021, equations 4 to 6).

    Args:
        scores: [N, E]; chosen: [N, k]. f is each expert's share of the R
        rows, P its mean share of a token's scores.
    """
    E = scores.shape[1]
    f = count_tokens(chosen, E) / chosen.numel()  # [E]
    P = (scores / scores.sum(-1, keepdim=True)).mean(0)  # [E]
    return E * (f * P).sum()


def swap_mlps(model, config):
    """Give a finished LLaMA mixtures of experts in place of its MLPs."""
    for layer in model.model.layers[config.dense_layers :]:
        like = layer.mlp.down_proj.weight
        layer.mlp = MoE(config).to(like.device, like.dtype)


def moe_layers(model):
    """The `MoE` modules of a model, from the bottom up."""
    return [m for m in model.modules() if isinstance(m, MoE)]


@torch.no_grad()
def balance_experts(model, line):
    """After each step: report each layer's load, and nudge DeepSeek's biases.

    All ranks call it. The bias of an expert with more than the mean load of
    the step falls by `config.balance`, that of one with less rises.

    Args:
        line: gets load_max/LAYER and load_min/LAYER, in units of the mean.
    """
    layers = {
        i: layer.mlp
        for i, layer in enumerate(model.model.layers)
        if isinstance(layer.mlp, MoE)
    }
    loads = torch.stack([mlp.load for mlp in layers.values()])  # [L, E]
    loads = mean_over_ranks(loads)
    for (i, mlp), load in zip(layers.items(), loads, strict=True):
        mean = load.mean()
        line[f"load_max/{i}"] = (load.max() / mean).item()
        line[f"load_min/{i}"] = (load.min() / mean).item()
        for bias in mlp.gate.buffers():
            bias += model.config.balance * torch.sign(mean - load)
        mlp.load.zero_()


class MoEForCausalLM(LlamaForCausalLM):
    """A LLaMA with mixtures of experts; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__(config)
        swap_mlps(self, config)
        self.init_weights()

    def forward(self, input_ids=None, *, targets=None, **inputs):
        """As `LlamaForCausalLM`; the loss's gradient has a balancing term."""
        out = super().forward(input_ids, targets=targets, **inputs)
        if targets is None or not (self.training and torch.is_grad_enabled()):
            return out
        layers, term = moe_layers(self), 0.0
        for mlp in layers:
            scores, chosen = mlp.latest
            with torch.no_grad():
                mlp.load += count_tokens(chosen, scores.shape[1])
            term = term + balance_term(scores, chosen)
        if self.config.mlp == "mixtral":
            # The value stays the cross-entropy; only the gradient changes.
            out = out + self.config.balance * (term - term.detach())
        return out

    def flops_per_token(self, sequence_length, training=True):
        """FLOPs a token, of the experts that it uses and of the routers."""
        c = self.config
        dense = flops_per_token(c, sequence_length, training)
        one_token = c.experts_per_token + c.shared_experts
        weights = 3 * (one_token * c.expert_size - c.intermediate_size)
        weights = (weights + c.experts) * c.hidden_size  # and the router
        layers = c.num_hidden_layers - c.dense_layers
        return dense + (6 if training else 2) * layers * weights
