"""DRAFT"""
import math
import torch
from torch import nn
from torch.nn import functional as F
from llama_tut.block import LlamaDecoderLayer
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.rope import LlamaRotaryEmbedding

class LlamaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
    def forward(self, input_ids, position_ids=None, attention_mask=None, cache=None):
        start = 0 if cache is None else cache[0].length
        if position_ids is None:
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(position_ids)
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attention_mask, None if cache is None else cache[i])
        return self.norm(x)

class LlamaForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    @property
    def output_weight(self):
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
    def forward(self, input_ids, position_ids=None, attention_mask=None, cache=None, targets=None):
        h = self.model(input_ids, position_ids, attention_mask, cache)
        if targets is not None:
            return head_loss(h, self.output_weight, targets)
        return F.linear(h, self.output_weight)

def head_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2).float(), targets.flatten())

def initialize(model, generator=None):
    s, L = model.config.initializer_range, model.config.num_hidden_layers
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = s / math.sqrt(2 * L) if name.endswith(("o_proj.weight", "down_proj.weight")) else s
            nn.init.normal_(p, std=std, generator=generator)

def parameter_count(config): ...
def flops_per_token(config, sequence_length): ...
