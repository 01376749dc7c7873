# From notebooks/26_moe.ipynb by scripts/export.py: edit the notebook.
"""Mixture of experts: many MLPs, of which each token uses a few.

Letters: B batch, T time, N = B*T tokens, D hidden_size, L layers, E experts,
k experts that a token chooses, I width of an expert, R = N*k rows, W ranks.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from llama_tut.mlp import LlamaMLP
from llama_tut.model import LlamaForCausalLM, flops_per_token
from llama_tut.tools.devices import without_memory
from llama_tut.tools.files import read_json, require
from llama_tut.tools.moe_config import MoEConfig, MoeOptions
from llama_tut.tools.moe_weights import fill, stacked_table, unstack_experts
from llama_tut.tools.options import extra_options, llama_config
from llama_tut.tools.ranks import mean_over_ranks
from llama_tut.weights import FAMILIES, check_table

# Choosing, the first way: Mixtral


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


# Choosing, the second way: DeepSeek-V3


def route_deepseek(logits, bias, k, groups=1, open_groups=1, scale=1.0):
    """Sigmoids; the bias helps to choose, and is not in the weights.

    Args:
        logits: [N, E].
        bias: one number for each expert, [E].
        groups, open_groups: the experts stand in `groups` groups. A token may
            use `open_groups` of them: those whose two best experts together
            score most.
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


class Router(nn.Module):
    """Scores the experts, and chooses for each token; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__()
        E, self.config = config.experts, config
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        if config.mlp == "deepseek":
            self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def init_weights(self, std, output_std=None, generator=None):
        """Draw the matrix from N(0, std^2); the bias starts at 0."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        for bias in self.buffers():
            nn.init.zeros_(bias)

    def forward(self, x):
        """x [N, D] -> scores [N, E], chosen [N, k], weights [N, k]."""
        c = self.config
        # In float32: a rounded logit can choose another expert.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # [N, E]
        if c.mlp == "mixtral":
            return route_mixtral(logits, c.experts_per_token)
        return route_deepseek(
            logits,
            self.e_score_correction_bias,
            c.experts_per_token,
            c.expert_groups,
            c.open_groups,
            c.routed_scale,
        )


# The experts: a loop first


class Experts(nn.Module):
    """E MLPs of chapter 6 in three stacks; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__()
        E, D, I = config.experts, config.hidden_size, config.expert_size
        self.E = E
        self.gate_proj = nn.Parameter(torch.empty(E, I, D))
        self.up_proj = nn.Parameter(torch.empty(E, I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

    def init_weights(self, std, output_std, generator=None):
        """Draw from N(0, std^2); `down_proj` writes and has `output_std`."""
        stds = std, std, output_std
        for stack, s in zip(self.parameters(), stds, strict=True):
            nn.init.normal_(stack, std=s, generator=generator)

    def forward(self, x, chosen, weights):
        """x [N, D], chosen and weights [N, k] -> [N, D], in a loop."""
        out = torch.zeros_like(x)  # [N, D]
        stacks = (stack.unbind() for stack in self.parameters())
        for e, (gate, up, down) in enumerate(zip(*stacks, strict=True)):
            token, place = torch.where(chosen == e)  # who chose this one
            rows = x[token]  # [n, D]
            hidden = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
            y = F.linear(hidden, down) * weights[token, place, None]  # [n, D]
            out = out.index_add(0, token, y.to(x.dtype))
        return out


# Then without the loop: sorted rows


class SortedExperts(Experts):
    """The same numbers as `Experts`, without a loop."""

    def forward(self, x, chosen, weights):
        """x [N, D], chosen and weights [N, k] -> [N, D]."""
        N, k = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # [R], by expert
        rows = x[:, None].expand(N, k, -1).flatten(0, 1)  # [R, D], by token
        y = self.of_sorted(rows[order], count_rows(chosen, self.E))  # [R, D]
        y = y[order.argsort()].view(N, k, -1)  # [N, k, D], by token again
        return (y * weights[..., None]).sum(1).to(x.dtype)  # [N, D]

    def of_sorted(self, rows, load):
        """Rows [R, D] sorted by expert, and how many each gets, [E]."""
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        gate, up, down = (p.to(dtype).mT for p in self.parameters())
        multiply = partial(grouped_product, load=load)
        rows = rows.to(dtype)  # [R, D]
        hidden = F.silu(multiply(rows, gate)) * multiply(rows, up)  # [R, I]
        return multiply(hidden, down)  # [R, D]


def count_rows(chosen, E):
    """chosen [N, k] -> how many rows each of E experts gets, [E]."""
    ones = torch.ones_like(chosen.flatten())  # [R]
    return ones.new_zeros(E).scatter_add(0, chosen.flatten(), ones)  # [E]


def grouped_product(rows, stack, load):
    """Rows [R, a] sorted by expert times stack [E, a, b] -> [R, b]."""
    # F.grouped_mm wants rows that are multiples of 16 bytes.
    sizes = (rows.shape[1] * rows.itemsize, stack.shape[2] * rows.itemsize)
    if hasattr(F, "grouped_mm") and not any(size % 16 for size in sizes):
        ends = load.cumsum(0).to(torch.int32)  # [E]
        return F.grouped_mm(rows, stack, offs=ends)  # [R, b]
    pieces = rows.split(load.tolist())
    pairs = zip(pieces, stack.unbind(), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pairs])  # [R, b]


# The layer


class MoE(nn.Module):
    """Takes the place of a `LlamaMLP`; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__()
        self.gate, self.experts = Router(config), SortedExperts(config)
        self.shared_experts = None
        if config.shared_experts:
            width = config.shared_experts * config.expert_size
            self.shared_experts = LlamaMLP(
                replace(config, intermediate_size=width)
            )
        # How many rows of the present step each expert has got.
        load = torch.zeros(config.experts)
        self.register_buffer("load", load, persistent=False)

    def init_weights(self, std, output_std, generator=None):
        """Draw router, experts and shared experts; no row is counted yet."""
        for part in self.children():
            part.init_weights(std, output_std, generator)
        nn.init.zeros_(self.load)

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]."""
        flat = x.flatten(0, -2)  # [N, D]
        scores, chosen, weights = self.gate(flat)
        # Kept, not added up: a pass that is recomputed only overwrites it.
        self.latest = scores, chosen
        out = self.experts(flat, chosen, weights).view_as(x)  # [B, T, D]
        if self.shared_experts is None:
            return out
        return out + self.shared_experts(x)  # [B, T, D]


# Why experts must be kept busy


def balance_term(scores, chosen):
    """E * sum of f * P: 1 when balanced (Fedus, 2021, equations 4 to 6).

    f is an expert's share of the R rows, and P its mean share of the scores.

    Args:
        scores: [N, E]; chosen: [N, k]; of one layer.
    """
    E = scores.shape[1]
    f = count_rows(chosen, E) / chosen.numel()  # [E]
    P = (scores / scores.sum(-1, keepdim=True)).mean(0)  # [E]
    return E * (f * P).sum()  # []


# A finished LLaMA, swapped from outside


def moe_layers(model):
    """{number of the layer: its `MoE`}."""
    mlps = {i: layer.mlp for i, layer in enumerate(model.model.layers)}
    return {i: mlp for i, mlp in mlps.items() if isinstance(mlp, MoE)}


def swap_mlps(model, config):
    """Give a finished LLaMA experts in place of its MLPs, from outside."""
    for layer in model.model.layers[config.dense_layers :]:
        like = layer.mlp.down_proj.weight
        layer.mlp = MoE(config).to(like.device, like.dtype)


class MoEForCausalLM(LlamaForCausalLM):
    """A LLaMA with mixtures of experts; config: `MoEConfig`."""

    def __init__(self, config):
        super().__init__(config)
        swap_mlps(self, config)
        self.init_weights()

    def forward(self, input_ids=None, *, targets=None, **inputs):
        """As `LlamaForCausalLM`; in training, rows are counted as well."""
        out = super().forward(input_ids, targets=targets, **inputs)
        if targets is None or not self.training:
            return out
        term = 0.0
        for mlp in moe_layers(self).values():
            scores, chosen = mlp.latest
            mlp.load += count_rows(chosen, scores.shape[1])
            term = term + balance_term(scores, chosen)
        if self.config.mlp == "mixtral":
            # The value stays the cross-entropy; the gradient gets the term.
            out = out + self.config.balance * (term - term.detach())
        return out  # []

    def flops_per_token(self, sequence_length, training=True):
        """FLOPs per token, with the experts that it uses and the routers."""
        c, passes = self.config, 3 if training else 1
        n = c.experts_of_a_token * c.expert_size - c.intermediate_size
        more = c.hidden_size * (3 * n + c.experts)  # weights of a layer
        layers = c.num_hidden_layers - c.dense_layers
        dense = flops_per_token(c, sequence_length, training)
        return dense + passes * 2 * layers * more

    def hf_tensors(self):
        """For `save_pretrained`: tensors under their names in HF's files."""
        return unstack_experts(self.state_dict(), self.config.mlp == "mixtral")


@torch.no_grad()
def balance_experts(model, line):
    """After each step, on all ranks: nudge DeepSeek's biases, report loads.

    The bias of an expert with more than the mean load falls by
    `config.balance`, the bias of one with less rises by it.

    Args:
        line: gets load_max/LAYER and load_min/LAYER, in units of the mean.
    """
    layers = moe_layers(model)
    loads = torch.stack([mlp.load for mlp in layers.values()])  # [L, E]
    loads = mean_over_ranks(loads)  # [L, E]
    for (i, mlp), load in zip(layers.items(), loads, strict=True):
        mean = load.mean()
        line[f"load_max/{i}"] = (load.max() / mean).item()
        line[f"load_min/{i}"] = (load.min() / mean).item()
        for bias in mlp.gate.buffers():  # Mixtral's router has none
            bias += model.config.balance * torch.sign(mean - load)
        mlp.load.zero_()


# Check: real names, real formats


def load_moe(folder, dtype=None, device="cpu"):
    """`load_pretrained` for a folder of Mixtral or of GLM-4.5."""
    config = MoEConfig.from_hf(read_json(Path(folder) / "config.json"))
    with without_memory():
        model = MoEForCausalLM(config)
    table = stacked_table(folder)
    check_table(table, model)
    return fill(model, table, dtype, device)


for kind in ("mixtral", "glm4_moe", "deepseek_v3"):
    FAMILIES[kind] = MoEConfig, load_moe

# Through the trainer


def build_moe(config, info):
    """As `build_llama`, with the experts that the run's options ask for."""
    llama = llama_config(config, info)
    options = extra_options(config, MoeOptions)
    return MoEForCausalLM(MoEConfig(**vars(llama), **vars(options)))


# Experts on many ranks


class Exchange(torch.autograd.Function):
    """Rows go to other ranks; their gradients come back the same way."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        """rows [sum(sent), D] -> [sum(received), D]; a count a rank."""
        ctx.counts = sent, received, group
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        """gradient [sum(received), D] -> [sum(sent), D]."""
        sent, received, group = ctx.counts
        back = Exchange.apply(gradient, received, sent, group)
        return back, None, None, None


class SpreadExperts(SortedExperts):
    """E/W of a layer's experts, for the tokens of all W ranks.

    Their gradients are divided by W: means over ranks, as DDP makes them.
    """

    def __init__(self, experts, group=None):
        nn.Module.__init__(self)
        self.group, self.W = group, dist.get_world_size(group)
        self.E, rank = experts.E, dist.get_rank(group)
        whole = self.E % self.W == 0
        require(whole, f"{self.E} experts: {self.W} ranks do not divide them")
        for name, stack in experts.named_parameters():
            own = nn.Parameter(stack.detach().chunk(self.W)[rank].clone())
            own.register_hook(lambda gradient: gradient / self.W)
            setattr(self, name, own)

    def of_sorted(self, rows, load):
        """Rows [R, D] of this rank sorted by expert, and their number, [E]."""
        arriving = torch.empty_like(load)  # [E]: W times the own experts
        dist.all_to_all_single(arriving, load, group=self.group)
        sent = load.view(self.W, -1).sum(1).tolist()
        received = arriving.view(self.W, -1).sum(1).tolist()
        rows = Exchange.apply(rows, sent, received, self.group)
        own = torch.arange(len(self.gate_proj), device=load.device)
        expert = own.repeat(self.W).repeat_interleave(arriving)
        order = expert.argsort(stable=True)  # by expert, not by rank
        y = super().of_sorted(rows[order], arriving.view(self.W, -1).sum(0))
        y = torch.empty_like(y).index_copy(0, order, y)
        return Exchange.apply(y, received, sent, self.group)


def spread_experts(model, group=None):
    """Leave each rank of the group its share of the experts, in place."""
    for mlp in moe_layers(model).values():
        mlp.experts = SpreadExperts(mlp.experts, group)
