"""A plan: size, tokens, hours and cost of a run before it is made."""

from dataclasses import dataclass

from llama_tut.config import LlamaConfig
from llama_tut.tools.devices import PEAKS
from llama_tut.tools.files import require

MEMORY = {"H100": 80e9, "H200": 141e9, "A100": 80e9, "4090": 24e9}  # bytes


@dataclass(frozen=True)
class Gpu:
    """Speeds from the data sheets, in bytes per second and FLOPs per second."""

    memory: float  # bytes
    peak: float  # dense products in bfloat16
    bandwidth: float  # of its memory
    nvlink: float  # in one direction, to the GPUs of the same node
    network: float  # in one direction, one card for each GPU


GPUS = {
    "H100": Gpu(MEMORY["H100"], PEAKS["H100"], 3.35e12, 450e9, 50e9),
    "H200": Gpu(MEMORY["H200"], PEAKS["H200"], 4.8e12, 450e9, 50e9),
    "A100": Gpu(MEMORY["A100"], PEAKS["A100"], 2.04e12, 300e9, 25e9),
}


def llama3(D, I, L, H, **others):
    """The config of a LLaMA 3, by the letters."""
    return LlamaConfig(128_256, D, I, L, H, 8, rope_theta=500_000.0, **others)


LLAMA3 = {
    "llama3-1b": llama3(2048, 8192, 16, 32, tie_word_embeddings=True),
    "llama3-8b": llama3(4096, 14336, 32, 32),
    "llama3-70b": llama3(8192, 28672, 80, 64),
    "llama3-405b": llama3(16384, 53248, 126, 128),
}


def short(x):
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


@dataclass(frozen=True)
class Plan:
    """A run before it is made; cost is None without a price."""

    size: float
    tokens: float
    flops: float
    hours: float
    device_hours: float
    cost: float | None
    state_bytes: float  # weights, gradients, AdamW: 16 bytes per parameter
    least_devices: int  # that hold this state, if it is cut

    def __str__(self):
        price = "" if self.cost is None else f", cost {short(self.cost)}"
        return (
            f"{short(self.size / 1e9)}B parameters, "
            f"{short(self.tokens / 1e9)}B tokens, {self.flops:.3g} FLOPs: "
            f"{short(self.hours)} hours, {short(self.device_hours)} device "
            f"hours{price}; {short(self.state_bytes / 1e9)} GB of state, on "
            f"{self.least_devices} or more devices"
        )


def check_plan(device, mfu, flops, size, tokens, *others):
    """Refuse what makes no plan. Raises: InputError."""
    known = ", ".join(PEAKS)
    require(device in PEAKS, f"{device!r} is unknown: take {known}")
    given = (flops is not None, size is not None, tokens is not None)
    require(
        given in ((1, 0, 0), (1, 1, 0), (0, 1, 1)),
        "give flops, flops and size, or size and tokens",
    )
    numbers = (mfu, flops, size, tokens, *others)
    require(
        all(x > 0 for x in numbers if x is not None) and mfu <= 1,
        "all numbers are above 0, and mfu is at most 1",
    )
