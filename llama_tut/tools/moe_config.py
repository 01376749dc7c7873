"""Options of scripts/train.py for experts, and the config of such a model."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from llama_tut.config import LlamaConfig, check_number, option
from llama_tut.tools.files import require
from llama_tut.tools.moe_weights import read_moe, write_moe
from llama_tut.tools.options import check_choices, flag


@dataclass(frozen=True)
class MoeOptions:
    """experts in place of each MLP (chapter 26)"""

    mlp: Literal["dense", "mixtral", "deepseek"] = option("dense", "which MLP")
    experts: int = option(8, "E, experts of a layer")
    experts_per_token: int = option(2, "k, experts that a token chooses")
    shared_experts: int = option(0, "s, experts that every token uses")
    expert_size: int | None = option(None, "width of one (None: I/(k+s))")
    expert_groups: int = option(1, "groups that the experts stand in")
    open_groups: int = option(1, "groups that a token may choose from")
    routed_scale: float = option(1.0, "what the k weights sum to")
    dense_layers: int = option(0, "layers at the bottom that stay dense")
    balance: float | None = option(
        None,
        "factor of Mixtral's balancing term (None: 0.01), or how far "
        "DeepSeek's biases move in a step (None: 0.001); 0: no balancing",
    )

    def __post_init__(self):
        check_choices(self)
        given = [f.name for f in fields(MoeOptions) if self.differs(f)]
        require(
            self.mlp != "dense" or not given,
            f"{flag(given[0]) if given else ''} needs --mlp mixtral or "
            "--mlp deepseek",
        )

    def differs(self, field):
        """Whether this field has another value than its default."""
        return getattr(self, field.name) != field.default


DEEPSEEK_ONLY = "shared_experts expert_groups routed_scale dense_layers"


@dataclass(frozen=True)
class MoEConfig(MoeOptions, LlamaConfig):
    """A LLaMA whose MLPs are mixtures of experts.

    Raises:
        InputError: these numbers do not make a model that can be built.
    """

    def __post_init__(self):
        MoeOptions.__post_init__(self)
        LlamaConfig.__post_init__(self)
        check_moe(self)
        if self.expert_size is None:
            I, n = self.intermediate_size, self.experts_of_a_token
            require(
                I % n == 0,
                f"--intermediate-size {I} is not a multiple of the {n} "
                "experts of a token: change it, or give --expert-size",
            )
            object.__setattr__(self, "expert_size", I // n)
        if self.balance is None:
            strength = {"mixtral": 0.01, "deepseek": 0.001}[self.mlp]
            object.__setattr__(self, "balance", strength)

    @property
    def experts_of_a_token(self):
        """k + s: those that it chooses, and those that are always on."""
        return self.experts_per_token + self.shared_experts

    @classmethod
    def from_hf(cls, hf):
        """Read a transformers config or the dictionary of a config.json."""
        return cls(**read_moe(hf if isinstance(hf, dict) else hf.to_dict()))

    def extra_activation_bytes(self, dtype):
        """What a token of a layer keeps for the backward pass beyond what a
        dense MLP of `intermediate_size` keeps; chapter 26 measures it."""
        a, D, k = dtype.itemsize, self.hidden_size, self.experts_per_token
        wider = self.experts_of_a_token * self.expert_size
        rows = k * (2 * a * D + 32)  # sorted and unsorted, and their places
        router = 4 * self.experts + (4 - a) * D  # in float32
        return 4 * a * (wider - self.intermediate_size) + rows + router

    def to_hf(self):
        """The dictionary of a config.json, of Mixtral or of GLM-4.5."""
        return write_moe(self, super().to_hf())


def check_moe(c):
    """Refuse, by name, numbers of a MoEConfig that do not fit."""
    E, k = c.experts, c.experts_per_token
    G, some = c.expert_groups, c.open_groups
    require(c.mlp != "dense", "--mlp dense has no experts")
    for name in "experts experts_per_token expert_groups open_groups".split():
        check_number(flag(name), getattr(c, name), whole=True)
    if c.expert_size is not None:
        check_number("--expert-size", c.expert_size, whole=True)
    for name in ("shared_experts", "dense_layers", "balance"):
        value = getattr(c, name) or 0
        require(
            0 <= value < math.inf,
            f"{flag(name)} must be a number, at least 0, not {value}",
        )
    require(
        c.dense_layers < c.num_hidden_layers,
        f"--dense-layers {c.dense_layers}: one of the "
        f"{c.num_hidden_layers} layers must have experts",
    )
    require(k <= E, f"--experts-per-token {k} is more than --experts {E}")
    require(
        E % G == 0,
        f"--experts {E} is not a multiple of --expert-groups {G}",
    )
    require(some <= G, f"--open-groups {some}: there are only {G} groups")
    require(G == 1 or 2 * G <= E, f"--expert-groups {G}: two experts each")
    room = E // G * some
    require(
        k <= room,
        f"--experts-per-token {k}: the {some} open groups have only {room} "
        "experts",
    )
    check_number("--routed-scale", c.routed_scale)
    for name in DEEPSEEK_ONLY.split():
        usual = MoeOptions.__dataclass_fields__[name].default
        require(
            c.mlp == "deepseek" or getattr(c, name) == usual,
            f"{flag(name)} is not part of Mixtral: take --mlp deepseek",
        )
