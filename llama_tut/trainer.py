# From notebooks/15_trainer.ipynb by scripts/export.py: edit the notebook.
"""Trainer: options, presets, a plan of memory, and the loop that trains.

Letters: B batch, T time, D hidden_size, H heads, K kv heads, C head_dim,
I intermediate_size, V vocabulary, L layers, W ranks, N parameters or items.
"""

import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import matplotlib.style
import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from torch.nn import functional as F
from tqdm import tqdm

from llama_tut.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
)
from llama_tut.config import LlamaConfig, RopeScaling, option
from llama_tut.distributed import (
    Ranks,
    broadcast_object,
    gather_objects,
    mean_over_ranks,
    micro_step_sync,
    rehearse,
    shared_errors,
    start,
    stop,
    wait_for_all,
    wrap,
)
from llama_tut.generate import generate
from llama_tut.hellaswag import accuracy, read_examples, score
from llama_tut.loader import ShardLoader
from llama_tut.model import LlamaForCausalLM, flops_per_token
from llama_tut.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
)
from llama_tut.tools.files import InputError, write_json
from llama_tut.tools.prepare import DatasetInfo, load_dataset_info
from llama_tut.tools.shards import first_tokens
from llama_tut.tools.tokenizers import read_tokenizer
from llama_tut.weights import save_pretrained

# Options: one place

Precision = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run. Raises InputError for a value that cannot be."""

    data: str = option("", "folder with tokens, made by scripts/prepare.py")
    out: str = option("", "folder of this run")
    preset: str = option("laptop", "row of PRESETS that the others start from")
    resume: bool = option(False, "go on from the newest valid checkpoint")
    steps: int = option(100, "optimizer steps of the whole run")
    sequence_length: int = option(128, "T, tokens in a row")
    micro_batch_size: int = option(4, "B, rows a rank takes at once")
    tokens_per_step: int = option(1024, "tokens of one step, of all ranks")
    optimizer: Literal["adamw", "muon"] = option("adamw", "which optimizer")
    learning_rate: float = option(3e-3, "largest learning rate")
    warmup_steps: int | None = option(None, "steps of warm-up (None: 5 %)")
    schedule: Literal["cosine", "wsd"] = option("cosine", "after the warm-up")
    final_fraction: float = option(0.1, "last rate over the largest")
    weight_decay: float = option(0.1, "decay of the matrices")
    beta1: float = option(0.9, "memory of AdamW's mean of the gradient")
    beta2: float = option(0.95, "memory of AdamW's mean of its square")
    max_norm: float = option(1.0, "gradients are clipped to this norm")
    seed: int = option(0, "of the first weights and the order of the rows")
    dtype: Precision = option("float32", "of products (auto: what is fast)")
    device: str = option("auto", "auto, cpu, cuda or mps")
    compile: bool = option(False, "compile the model, if a compiler is here")
    vocab_multiple: int = option(1, "round V up to a multiple of this")
    eval_every: int = option(0, "steps between validations (0: at the end)")
    eval_rows: int = option(256, "rows of validation text to measure")
    hellaswag: str = option("", "also measure it: own, a jsonl file or hub id")
    hellaswag_limit: int = option(200, "examples of it to measure")
    choice: int = option(
        0, "also measure continuation choice on so many items"
    )
    samples: int = option(2, "texts to write at the end")
    sample_tokens: int = option(100, "tokens of each text")
    prompt: str = option("", "how the texts begin")
    checkpoint_every: int = option(0, "steps between checkpoints (0: at end)")
    keep_checkpoints: int = option(3, "how many of them to keep")
    model: dict = field(default_factory=dict, metadata={"help": "its shape"})

    def __post_init__(self):
        check_options(self)


AT_LEAST = {
    1: "steps sequence_length micro_batch_size tokens_per_step eval_rows "
    "vocab_multiple hellaswag_limit sample_tokens keep_checkpoints",
    0: "learning_rate warmup_steps final_fraction weight_decay beta1 beta2 "
    "max_norm seed eval_every choice samples checkpoint_every",
}
AT_MOST = {"learning_rate": 10, "weight_decay": 10, "final_fraction": 1}
AT_MOST |= {"beta1": 0.99999, "beta2": 0.99999, "seed": 2**63 - 1}
AT_MOST |= {"vocab_multiple": 2**20, "samples": 1000}


def check_options(config):
    """Refuse values that no run can have, by the option's name."""
    for least, names in AT_LEAST.items():
        for name in names.split():
            value, most = getattr(config, name), AT_MOST.get(name, math.inf)
            if value is not None and not least <= value <= most:
                high = value > most
                bound = f"at most {most}" if high else f"at least {least}"
                raise InputError(f"{flag(name)} must be {bound}, not {value}")
    check_choices(config)
    if config.choice and config.sequence_length < CONTEXT + OPTION:
        raise InputError(
            f"--choice takes rows of {CONTEXT + OPTION} tokens: "
            f"--sequence-length {config.sequence_length} is too short"
        )


def check_choices(config):
    """Refuse a value that its field does not list. Raises: InputError."""
    for one in fields(config):
        value, allowed = getattr(config, one.name), choices(one)
        if allowed and value not in allowed:
            raise InputError(
                f"{flag(one.name)} {value!r}: take {' or '.join(allowed)}"
            )


def choices(one):
    """The values that a field of TrainConfig allows; () for any."""
    return get_args(one.type) if get_origin(one.type) is Literal else ()


def flag(name):
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


# Presets: rows of a table


def llama_shape(D, I, L, H, **others):
    """Options of a model, by the letters."""
    return {
        "hidden_size": D,
        "intermediate_size": I,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        **others,
    }


SHAPES = {
    "1m": llama_shape(128, 352, 4, 2, tie_word_embeddings=True),
    "124m": llama_shape(768, 2048, 12, 12, tie_word_embeddings=True),
    "350m": llama_shape(1024, 2688, 24, 16, tie_word_embeddings=True),
    "8b": llama_shape(
        4096, 14336, 32, 32, num_key_value_heads=8, rope_theta=500_000.0
    ),
}

COLUMNS = (
    "shape sequence_length micro_batch_size tokens_per_step steps "
    "learning_rate eval_every eval_rows checkpoint_every"
).split()
ROWS = {
    "laptop": ("1m", 128, 4, 1_024, 3_000, 3e-3, 1_000, 2_048, 500),
    "24gb": ("124m", 1024, 8, 524_288, 19_073, 6e-4, 250, 512, 250),
    "24gb-350m": ("350m", 1024, 4, 524_288, 19_073, 3e-4, 250, 512, 250),
    "h100": ("124m", 1024, 32, 524_288, 19_073, 6e-4, 250, 512, 250),
    "h100-350m": ("350m", 1024, 16, 524_288, 19_073, 3e-4, 250, 512, 250),
    "8xh100": ("124m", 1024, 32, 524_288, 19_073, 6e-4, 250, 512, 1_000),
    "8xh100-350m": ("350m", 1024, 16, 524_288, 19_073, 3e-4, 250, 512, 1_000),
    "llama3-8b": ("8b", 8192, 1, 524_288, 19_073, 3e-4, 250, 64, 1_000),
}


def preset(name):
    """The options of one row of PRESETS."""
    row = dict(zip(COLUMNS, ROWS[name], strict=True))
    full_size = name != "laptop"
    return {
        "preset": name,
        "dtype": "bfloat16" if full_size else "float32",
        "compile": full_size,
        "vocab_multiple": 128 if full_size else 1,
        "model": SHAPES[row.pop("shape")],
        **row,
    }


PRESETS = {name: preset(name) for name in ROWS}


def configure(options):
    """A TrainConfig from the options that were given, as a dictionary.

    Names of LlamaConfig's fields go to `model`.

    Raises: InputError for an unknown preset or a value that cannot be.
    """
    names = {f.name for f in fields(TrainConfig)}
    own = {k: v for k, v in options.items() if k in names}
    model = {k: v for k, v in options.items() if k not in names}
    for name in model.keys() - {f.name for f in fields(LlamaConfig)}:
        raise InputError(f"{flag(name)} is no option")
    base = started_with(own) or row_of(own.get("preset", "laptop"))
    if base["preset"] != own.get("preset", base["preset"]):
        raise InputError(
            f"--preset {own['preset']}: this run was started with "
            f"{base['preset']}"
        )
    return TrainConfig(**base | own | {"model": base["model"] | model})


def row_of(name):
    """One row of PRESETS."""
    if name not in PRESETS:
        raise InputError(
            f"--preset {name!r} is unknown: take {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def started_with(options):
    """The options that a run to be resumed was started with, if any."""
    path = Path(options.get("out", "")) / "config.json"
    if not options.get("resume") or not path.is_file():
        return None
    try:
        return json.loads(path.read_text())["config"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: not readable ({error})") from error


# The model of a run


def llama_config(config, info):
    """The LlamaConfig of a run on this data.

    Raises: InputError when the vocabulary or the context is too small.
    """
    multiple = config.vocab_multiple
    options = {
        "vocab_size": math.ceil(info.vocab_size / multiple) * multiple,
        "max_position_embeddings": config.sequence_length,
        "bos_token_id": info.end_of_text,
        "eos_token_id": info.end_of_text,
        **config.model,
    }
    if isinstance(options.get("rope_scaling"), dict):
        options["rope_scaling"] = RopeScaling(**options["rope_scaling"])
    llama = LlamaConfig(**options)
    if llama.vocab_size < info.vocab_size:
        raise InputError(
            f"--vocab-size {llama.vocab_size}: the data has "
            f"{info.vocab_size} different tokens"
        )
    if llama.max_position_embeddings < config.sequence_length:
        raise InputError(
            f"--sequence-length {config.sequence_length} is longer than "
            f"--max-position-embeddings {llama.max_position_embeddings}"
        )
    return llama


def build_llama(config, info):
    """A LLaMA with random weights for these options and this data."""
    model = LlamaForCausalLM(llama_config(config, info))
    model.init_weights()
    return model


# Accumulation follows


def micro_steps(config, world_size):
    """Micro batches a rank takes in one step.

    Raises: InputError when the tokens of a step cannot be shared out.
    """
    B, T = config.micro_batch_size, config.sequence_length
    at_once = B * T * world_size
    if config.tokens_per_step % at_once:
        raise InputError(
            f"--tokens-per-step {config.tokens_per_step} is not a multiple "
            f"of micro batch {B} x sequence length {T} x {world_size} ranks "
            f"= {at_once}: change one of them"
        )
    return config.tokens_per_step // at_once


# Precision


def matmul_dtype(config, device):
    """float32 or bfloat16; "auto" asks the processor."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    """A context in which matrix products run in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


# A plan of memory


def activation_bytes(llama, T, dtype, fused=False):
    """Bytes that one token of one block keeps for the backward pass.

    Args:
        llama: a `LlamaConfig`.
        fused: whether one kernel does the attention.
    """
    D, I = llama.hidden_size, llama.intermediate_size
    H, C = llama.num_attention_heads, llama.head_dim
    queries, keys = H * C, llama.num_key_value_heads * C
    a, half = dtype.itemsize, dtype.itemsize == 2
    norms = 16 * D + (5 if half else 2) * a * D
    attention = a * (3 * queries + 2 * keys)
    if not fused:
        n = math.ceil(T / max(32, math.ceil(T / 8)))  # blocks of queries
        weights = H * T / n * (6 if half else 4)
        attention = 2 * a * queries + (n + 1) / 2 * (2 * a * keys + weights)
    return norms + attention + 4 * a * I


def memory_plan(config, model, device, dtype):
    """{purpose: bytes} of one rank. The model may be on the meta device."""
    T = config.sequence_length
    rows = config.micro_batch_size * T
    N = sum(p.numel() for p in model.parameters())
    half = dtype == torch.bfloat16
    plan = {
        "parameters": 4 * N,
        "gradients": 4 * N,
        "optimizer": 8 * N,
        "bfloat16 copies": 2 * N * half,
    }
    llama = model.config
    if isinstance(llama, LlamaConfig):
        V, D = llama.vocab_size, llama.hidden_size
        fused = half and device.type == "cuda"
        block = activation_bytes(llama, T, dtype, fused)
        kept = llama.num_hidden_layers * block + 12 * D
        plan["activations"] = round(rows * kept)
        tile = 2**28 if device.type == "cuda" else 2**23
        plan["head"] = 4 * V * D + 3 * min(tile, 4 * rows * V)
    return plan


in_bytes = EngFormatter("B", places=2)  # 1.6e9 -> "1.60 GB"


def capacity(device):
    """Bytes that one rank may use on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_memory(plan, available, where):
    """Refuse a plan that cannot fit. Raises: InputError."""
    total = sum(plan.values())
    if total <= available:
        return
    moving = plan.get("activations", 0) + plan.get("head", 0)
    advice = "choose a smaller --micro-batch-size"
    if total - moving > available:
        advice = "choose a smaller model, or a larger device"
    raise InputError(
        f"a rank needs {in_bytes(total)} (of which activations "
        f"{in_bytes(moving)}), {where} has {in_bytes(available)}: {advice}"
    )


# One step


def train_step(model, optimizer, batches, max_norm=1.0, cast=nullcontext):
    """One optimizer step on k micro batches, averaged.

    Args:
        batches: a list of (inputs, targets), each [B, T].
        cast: called for the context of each forward pass, as `autocast`.

    Returns: the mean loss of this rank and the norm of the gradient, scalars.
    """
    total = 0.0
    for i, (inputs, targets) in enumerate(batches):
        with micro_step_sync(model, last=i == len(batches) - 1):
            with cast():
                loss = model(inputs, targets=targets) / len(batches)
            loss.backward()
        total = total + loss.detach()
    norm = clip_gradients(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


# Validation


@torch.no_grad()
def evaluate(model, loader, rows, ranks, cast=nullcontext):
    """Mean loss in nats a token over the first `rows` rows of `loader`.

    Args:
        model: the inner model, without DDP: ranks may differ in batches.
        loader: a `ShardLoader` of one rank that does not shuffle.
    """
    B = loader.batch_size
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, tokens
    model.eval()
    for first in range(ranks.rank * B, rows, ranks.world_size * B):
        loader.position = first
        inputs, targets = loader.next_batch()
        targets[rows - first :] = -100
        inputs, targets = inputs.to(ranks.device), targets.to(ranks.device)
        with cast():
            loss = model(inputs, targets=targets)
        count = (targets >= 0).sum().item()
        total += torch.tensor([loss.item() * count, count])
    model.train()
    if ranks.world_size > 1:
        total = mean_over_ranks(total.to(ranks.device))
    return (total[0] / total[1]).item()


# A language whose entropy we know


def floors(info):
    """Losses in nats a token that need no model of the text."""
    return {
        "uniform": math.log(info.vocab_size),
        "unigram": info.unigram_nats,
        "bigram": info.bigram_nats,
    }


# A choice between four continuations

CONTEXT, OPTION = 40, 20  # tokens


class Choices(NamedTuple):
    """Items: which of four options goes on with the context?"""

    contexts: torch.Tensor  # [N, 40]
    options: torch.Tensor  # [N, 4, 20]
    answers: torch.Tensor  # [N], which option is the true one


def seam_places(tokens, line_end, end_of_text):
    """Where an item can be cut out: (places of its seam, their documents).

    The tokens at seam - 40 .. seam + 19 are of one document, and a line ends
    in front of the seam. Arguments as in `choice_items`.
    """
    document = np.cumsum(tokens == end_of_text)
    seams = np.arange(CONTEXT, len(tokens) - OPTION + 1)
    first = seams - CONTEXT
    one = document[first] == document[seams + OPTION - 1]
    inside = one & (tokens[first] != end_of_text)
    seams = seams[inside & line_end[tokens[seams - 1]]]
    return seams, document[seams]


def other_places(seam, seams, draw):
    """Up to three of `seams`, whose windows touch no part of the item."""
    taken = []
    for place in draw.choice(seams, min(len(seams), 30), replace=False):
        apart = place >= seam + OPTION or place + OPTION <= seam - CONTEXT
        if apart and all(abs(place - other) >= OPTION for other in taken):
            taken.append(place)
    return taken[:3]


def cut_item(tokens, seam, seams, draw):
    """Context, options in a random order, and which is true; or None.

    Args:
        seams: those of the same document.
    """
    places = [seam, *other_places(seam, seams, draw)]
    options = np.stack([tokens[p : p + OPTION] for p in places])
    if len(np.unique(options, axis=0)) < 4:
        return None
    order = draw.permutation(4)
    return tokens[seam - CONTEXT : seam], options[order], order.argmin()


def choice_items(tokens, line_end, end_of_text, count, seed=0):
    """Draw items from a text.

    Args:
        tokens: ids, int64, with `end_of_text` in front of each document.
        line_end: for each id whether its text has a line break, bool [V].

    Returns: `Choices`.
    Raises: InputError when the text has not so many items.
    """
    seams, document = seam_places(tokens, line_end, end_of_text)
    draw, items = np.random.default_rng(seed), []
    used = np.zeros(len(tokens), bool)
    for i in draw.permutation(len(seams)):
        if len(items) == count:
            break
        first, last = np.searchsorted(document, document[i] + np.arange(2))
        item = cut_item(tokens, seams[i], seams[first:last], draw)
        whole = slice(seams[i] - CONTEXT, seams[i] + OPTION)
        if item is None or used[whole].any():
            continue
        used[whole] = True
        items.append(item)
    if len(items) < count:
        raise InputError(
            f"--choice {count}: the validation text has only {len(items)} "
            "such items: take fewer, or more text"
        )
    columns = zip(*items, strict=True)
    return Choices(*(torch.from_numpy(np.stack(c)) for c in columns))


@torch.no_grad()
def window_log_p(model, contexts, options, rows_at_once=32):
    """log p(option | context) -> [N]; contexts [N, S], options [N, 20]."""
    device, sums = next(model.parameters()).device, []
    rows = zip(
        contexts.split(rows_at_once), options.split(rows_at_once), strict=True
    )
    for context, window in rows:
        ids = torch.cat((context, window[:, :-1]), 1).to(device)
        out = model(ids)
        logits = getattr(out, "logits", out)[:, -OPTION:]  # [B, 20, V]
        wanted = window.flatten().to(device)
        logits = logits.flatten(0, 1).float()
        nats = F.cross_entropy(logits, wanted, reduction="none")
        sums.append(-nats.view(-1, OPTION).sum(1).cpu())
    return torch.cat(sums)


def choice_scores(model, choices, end_of_text, rows_at_once=32):
    """How much each context speaks for each of its options, [N, 4].

    Args:
        model: maps ids [B, T] to logits [B, T, V]; ours or transformers'.
        rows_at_once: B; the largest tensor is its logits, [B, 59, V].
    """
    options = choices.options.flatten(0, 1)
    contexts = choices.contexts.repeat_interleave(4, 0)
    nothing = torch.full_like(contexts[:, :1], end_of_text)
    score = window_log_p(model, contexts, options, rows_at_once)
    score = score - window_log_p(model, nothing, options, rows_at_once)
    return score.view(-1, 4)


def choice_accuracy(scores, answers):
    """(accuracy, its standard error) of scores [N, 4]."""
    right = (scores.argmax(1) == answers).double().mean().item()
    return right, math.sqrt(right * (1 - right) / max(len(answers) - 1, 1))


def choice_baselines(choices, train, tokenizer):
    """Accuracies that need no model of the text: {name: accuracy}.

    Args:
        train: ids of training text, int64, whose pairs are counted.
    """

    def words(ids):
        return set(re.findall(r"\w+", tokenizer.decode(ids).lower()))

    V = tokenizer.get_vocab_size()
    last, first = choices.contexts[:, -1:], choices.options[:, :, 0]
    wanted, where = np.unique(last * V + first, return_inverse=True)
    pairs = train[:-1] * V + train[1:]
    pairs = pairs[np.isin(pairs, wanted)]
    places = np.searchsorted(wanted, pairs)
    counts = np.bincount(places, minlength=len(wanted))
    seam = torch.from_numpy(counts[where]).view(first.shape)  # [N, 4]
    items = zip(
        choices.contexts.tolist(), choices.options.tolist(), strict=True
    )
    shared = [[len(words(o) & words(c)) for o in four] for c, four in items]
    return {
        "bigram at the seam": choice_accuracy(seam, choices.answers)[0],
        "word overlap": choice_accuracy(torch.tensor(shared), choices.answers)[
            0
        ],
        "chance": 0.25,
    }


CHOICE_TOKENS = 10_000_000  # of each split


def read_choices(folder, count):
    """Items of a data folder's validation text: (`Choices`, baselines).

    Raises: InputError as `choice_items`.
    """
    info = load_dataset_info(folder)
    tokenizer = read_tokenizer(Path(folder) / "tokenizer")
    texts = [tokenizer.decode([i]) for i in range(info.vocab_size)]
    line_end = np.array(["\n" in text for text in texts])
    val = first_tokens(folder, "val", CHOICE_TOKENS)
    choices = choice_items(val, line_end, info.end_of_text, count)
    train = first_tokens(folder, "train", CHOICE_TOKENS)
    return choices, choice_baselines(choices, train, tokenizer)


# Saying something, and agreeing


def say(ranks, line):
    """One line to stdout, once for all ranks."""
    if ranks.rank == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def on_rank_zero(ranks, function, *arguments):
    """Call a function on rank 0; all ranks wait, and get its result.

    Raises: the function's InputError, on all ranks.
    """
    answer = None
    with shared_errors(ranks.patient):
        if ranks.rank == 0:
            answer = function(*arguments)
    return broadcast_object(answer, ranks.patient)


# Compile, if it can be done


def compiled(model, config, ranks, cast):
    """The model compiled, or itself after one line that says why not."""
    fast, problem = torch.compile(model), None
    shape = (config.micro_batch_size, config.sequence_length)
    ids = torch.zeros(shape, dtype=torch.int64, device=ranks.device)
    try:
        with cast():
            loss = fast(ids, targets=ids)
        loss.backward()
    except Exception as error:  # whatever the compiler's tools raise
        problem = str(error).strip().splitlines()[0]
    model.zero_grad()
    problems = list(filter(None, gather_objects(problem, ranks.patient)))
    if not problems:
        return fast
    say(ranks, f"not compiled, going on without: {problems[0]}")
    return model


# The run's folder belongs to one run


def lock_folder(folder, resume, wait_s=5):
    """Lock a run's folder; the result is a context that holds the lock.

    Raises: InputError when it cannot be made, another process has it, or it
        holds a run and `resume` is off.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise InputError(
            f"{folder} is in use by a run that is going on: wait for it, "
            "or choose another --out"
        ) from error
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    old = (folder / "metrics.jsonl", folder / "checkpoints")
    if not resume and any(path.exists() for path in old):
        lock.release()
        raise InputError(
            f"{folder} holds a run already: go on with --resume, or "
            "choose another --out"
        )
    return held


@contextmanager
def claimed(config, ranks):
    """Hold the run's folder, on rank 0 for all ranks.

    Raises: InputError, on all ranks, when it cannot be had.
    """
    held = nullcontext()
    with shared_errors():
        if ranks.rank == 0:
            held = lock_folder(Path(config.out), config.resume)
    with held:
        yield


# A line a step


def read_metrics(path):
    """The lines of a metrics.jsonl; one cut off at the end is left out."""
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def truncate(path, step):
    """Drop the lines of steps after `step`: they will be done again."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_name(".metrics.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


class Recorder:
    """What rank 0 writes of a run of `steps`, after the first `step`."""

    def __init__(self, folder, step, steps):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path, self.problem = folder / "metrics.jsonl", None
        truncate(self.path, step)
        self.file = open(self.path, "a")
        board = folder / "tensorboard"
        self.board = SummaryWriter(board, purge_step=step + 1)
        shown = dict(unit="step", disable=None, leave=False)
        self.bar = tqdm(total=steps, initial=step, **shown)

    def write(self, line):
        """Record one step."""
        with self.noting_problems():
            print(json.dumps(line), file=self.file, flush=True)
            for name in line.keys() - {"step", "tokens"}:
                self.board.add_scalar(name, line[name], line["step"])
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed}", False)
        self.bar.update()

    def flush(self):
        """Wait until the lines are on the disk."""
        with self.noting_problems():
            os.fsync(self.file.fileno())

    @contextmanager
    def noting_problems(self):
        try:
            yield
        except OSError as error:
            self.problem = f"cannot write {self.path}: {error.strerror}"

    def close(self):
        for one in (self.bar, self.file, self.board):
            with self.noting_problems():
                one.close()


# Asked to stop


@contextmanager
def stop_signals():
    """Note SIGTERM and SIGINT instead of dying; yields the list of them."""
    seen = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may have handlers
        return

    def note(number, frame):
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What a run holds


@dataclass
class Run:
    """What the functions of the loop share."""

    config: TrainConfig
    info: DatasetInfo
    ranks: Ranks
    model: torch.nn.Module
    parallel: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loader: ShardLoader
    validation: ShardLoader
    cast: Callable
    step: int = 0
    recorder: Recorder | None = None
    choices: Choices | None = None
    baselines: dict = field(default_factory=dict)


def open_loaders(config, ranks):
    """The training rows of this rank, and the validation rows."""
    B, T = config.micro_batch_size, config.sequence_length
    who = (ranks.rank, ranks.world_size)
    loader = ShardLoader(config.data, "train", B, T, *who, seed=config.seed)
    validation = ShardLoader(config.data, "val", 1, T, shuffle=False)
    validation.batch_size = min(B, len(validation))
    return loader, validation


def announce(config, info, ranks, build_model):
    """Say what will be done and what it needs; refuse what cannot fit."""
    dtype, device = matmul_dtype(config, ranks.device), ranks.device
    with torch.device("meta"):
        model = build_model(config, info)
    say(ranks, describe_run(config, info, model))
    k = micro_steps(config, ranks.world_size)
    say(
        ranks,
        f"a step: ranks {ranks.world_size} x micro batches {k} x rows "
        f"{config.micro_batch_size} x tokens {config.sequence_length} = "
        f"{config.tokens_per_step:,} tokens, on {device.type}, {dtype}",
    )
    plan, room = memory_plan(config, model, device, dtype), capacity(device)
    parts = ", ".join(f"{n} {in_bytes(b)}" for n, b in plan.items() if b)
    total = in_bytes(sum(plan.values()))
    say(ranks, f"memory of a rank: {total} of {in_bytes(room)}: {parts}")
    check_memory(plan, room, f"{device.type} for each rank")


def describe_run(config, info, model):
    """One line: parameters, steps, tokens, epochs, FLOPs."""
    N = sum(p.numel() for p in model.parameters())
    tokens = config.steps * config.tokens_per_step
    line = (
        f"{N:,} parameters, {config.steps:,} steps, {tokens:,} tokens: "
        f"{tokens / info.train_tokens:.2f} epochs of {config.data}"
    )
    if isinstance(model.config, LlamaConfig):
        each = flops_per_token(model.config, config.sequence_length)
        line += f", {tokens * each:.3g} FLOPs"
    return line


def prepare_run(config, info, ranks, build_model):
    """Model, optimizer and data of a run, at its first step or resumed."""
    torch.manual_seed(config.seed)
    with shared_errors(ranks.patient):
        loader, validation = open_loaders(config, ranks)
    model = build_model(config, info).to(ranks.device)
    options = config.optimizer, config.learning_rate, config.weight_decay
    betas = config.beta1, config.beta2
    optimizer = build_optimizer(model, *options, betas)
    cast = partial(autocast, ranks.device, matmul_dtype(config, ranks.device))
    parallel = in_parallel(model, config, ranks, cast)
    parts = (model, parallel, optimizer, loader, validation, cast)
    run = Run(config, info, ranks, *parts)
    if config.resume:
        resume(run)
    return run


def in_parallel(model, config, ranks, cast):
    """What a step calls: the model compiled, wrapped and rehearsed."""
    fast = compiled(model, config, ranks, cast) if config.compile else model
    wait_for_all(ranks)
    parallel = wrap(fast, ranks)
    shape = (config.micro_batch_size, config.sequence_length)
    ids = torch.zeros(shape, dtype=torch.int64, device=ranks.device)
    rehearse(parallel, ids, ids, cast)
    return parallel


# Saved and resumed

SAME = ("sequence_length", "tokens_per_step", "seed", "optimizer")


def saved_state(run):
    """The plain values of a checkpoint, as they are now."""
    llama = run.model.config
    return {
        "position": run.loader.position,
        "world_size": run.ranks.world_size,
        "data": run.info.hash,
        "model": llama.to_hf() if isinstance(llama, LlamaConfig) else {},
        "config": asdict(run.config),
    }


def check_same(path, state, run):
    """Refuse to go on as another run. Raises: InputError."""
    now = json.loads(json.dumps(saved_state(run)))
    pairs = [
        (flag(name), state["config"][name], now["config"][name])
        for name in SAME
    ]
    pairs.append(("the hash of --data", state["data"], now["data"]))
    before, after = state["model"], now["model"]
    for name in sorted(before.keys() | after.keys()):
        pairs.append((flag(name), before.get(name), after.get(name)))
    for name, old, new in pairs:
        if old != new:
            raise InputError(
                f"cannot resume {path}: {name} was {old}, now it is {new}; "
                "give the old value, or start anew with another --out"
            )


def resume(run):
    """Put the newest valid checkpoint into the run; none: start at 0."""
    folder, ranks = Path(run.config.out) / "checkpoints", run.ranks
    path = on_rank_zero(ranks, latest_checkpoint, folder)
    if path is None:
        say(ranks, f"no checkpoint in {folder}: starting at step 0")
        return
    with shared_errors(ranks.patient):
        if not path.is_dir():
            raise InputError(f"rank {ranks.rank} does not see {path}")
        state = json.loads((path / "state.json").read_text())
        check_same(path, state, run)
        if state["step"] > run.config.steps:
            raise InputError(
                f"--steps {run.config.steps}: {path} is further already"
            )
        load_checkpoint(path, run.model, run.optimizer, ranks.rank)
    run.step, run.loader.position = state["step"], state["position"]
    say(ranks, f"resumed at step {run.step:,} from {path}")
    for name, new in asdict(run.config).items():
        old = state["config"].get(name)
        if old != new and name not in ("data", "out", "resume"):
            say(ranks, f"{flag(name)} was {old}, from here on it is {new}")


def save(run):
    """Write a checkpoint; all ranks call it, rank 0 writes."""
    states = gather_objects(random_states(), run.ranks.patient)
    on_rank_zero(run.ranks, write_run, run, states)


def write_run(run, states):
    """Rank 0's part of `save`: first the metrics, then the checkpoint."""
    run.recorder.flush()
    if run.recorder.problem:
        raise InputError(run.recorder.problem)
    folder = Path(run.config.out) / "checkpoints"
    what = (run.step, run.model, run.optimizer, saved_state(run))
    save_checkpoint(folder, *what, run.config.keep_checkpoints, states)


# The loop


def rate_of(config, step):
    """Learning rate of a step, counted from 0."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = config.steps // 20
    peak, low = config.learning_rate, config.final_fraction
    schedule = config.schedule
    return learning_rate_at(step, peak, config.steps, warmup, schedule, low)


def one_step(run, signals):
    """Take one step; its line for metrics.jsonl, and whether to stop."""
    config, device = run.config, run.ranks.device
    began, rate = time.perf_counter(), rate_of(config, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    k = micro_steps(config, run.ranks.world_size)
    batches = [
        [ids.to(device) for ids in run.loader.next_batch()] for _ in range(k)
    ]
    loss, norm = train_step(
        run.parallel, run.optimizer, batches, config.max_norm, run.cast
    )
    problem = run.recorder is not None and run.recorder.problem
    wish = torch.tensor(float(bool(signals or problem)), device=device)
    loss, wish = mean_over_ranks(torch.stack((loss, wish))).tolist()
    run.step += 1
    line = {"step": run.step, "loss": loss, "lr": rate}
    line |= {"grad_norm": norm.item()}
    return line | speed_of(run, time.perf_counter() - began), wish > 0


def speed_of(run, seconds):
    """Tokens so far, tokens a second, and MFU where the peak is known."""
    config, llama = run.config, run.model.config
    speed = config.tokens_per_step / seconds
    line = {"tokens_per_second": round(speed, 1)}
    line |= {"tokens": run.step * config.tokens_per_step}
    peak = peak_flops(run.ranks.device)
    if peak and isinstance(llama, LlamaConfig):
        work = flops_per_token(llama, config.sequence_length)
        line["mfu"] = speed * work / (peak * run.ranks.world_size)
    return line


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}


def peak_flops(device):
    """FLOPs a second of a GPU in bfloat16; None when it is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def measure(run):
    """Validation loss, and what else is wanted, for metrics.jsonl."""
    rows = min(run.config.eval_rows, len(run.validation))
    nats = evaluate(run.model, run.validation, rows, run.ranks, run.cast)
    line = {"val_loss": nats, "bits_per_byte": run.info.bits_per_byte(nats)}
    text = f"validation {nats:.4f} nats a token, {{:.4f}} bits a byte"
    text = text.format(line["bits_per_byte"])
    if run.config.hellaswag:
        acc, error = on_rank_zero(run.ranks, measure_hellaswag, run)
        line["hellaswag"] = acc
        text += f", HellaSwag {acc:.1%} ± {error:.1%}"
    if run.config.choice:
        right, error = on_rank_zero(run.ranks, measure_choice, run)
        line["choice"] = right
        text += f", choice {right:.1%} ± {error:.1%}"
    say(run.ranks, f"step {run.step:,}: {text}")
    return line


def measure_hellaswag(run, limit=None):
    """Accuracy by summed log-probability, and its standard error."""
    source = None if run.config.hellaswag == "own" else run.config.hellaswag
    examples = read_examples(source, limit or run.config.hellaswag_limit)
    run.model.eval()
    with run.cast():
        predictions = score(run.model, load_tokenizer(run), examples)
    run.model.train()
    return accuracy(predictions)


def load_tokenizer(run):
    """The data's tokenizer as an object of transformers."""
    from transformers import AutoTokenizer  # takes seconds to import

    return AutoTokenizer.from_pretrained(Path(run.config.data) / "tokenizer")


def measure_choice(run, choices=None):
    """Accuracy on the items of the run, or others; its standard error."""
    choices = choices or run.choices
    run.model.eval()
    with run.cast():
        scores = choice_scores(run.model, choices, run.info.end_of_text)
    run.model.train()
    return choice_accuracy(scores, choices.answers)


def open_choices(run):
    """Rank 0: read the items, and measure them before the first step."""
    read = read_choices(run.config.data, run.config.choice)
    run.choices, run.baselines = read
    if run.step == 0:
        right, error = measure_choice(run)
        say(run.ranks, f"step 0: choice {right:.1%} ± {error:.1%}, untrained")


def loop(run, signals):
    """Train until the last step or a signal; whether the end was reached."""
    config, stopping = run.config, False
    while run.step < config.steps and not stopping:
        line, stopping = one_step(run, signals)
        if not math.isfinite(line["loss"]):
            raise InputError(
                f"the loss is {line['loss']} at step {run.step}: go on from "
                "the last checkpoint with a smaller --learning-rate"
            )
        last = run.step == config.steps
        if last or due(run.step, config.eval_every):
            line |= measure(run)
        if run.recorder is not None:
            run.recorder.write(line)
        if last or stopping or due(run.step, config.checkpoint_every):
            save(run)
    return run.step == config.steps


def due(step, every):
    """Whether something done every so many steps is due now."""
    return every > 0 and step % every == 0


# The end of a run


def draw_curves(folder, info, more=None):
    """A Figure of a run's metrics.jsonl: losses, floors, choice if measured.

    Args:
        more: further horizontal lines, {name: nats}.
    """
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    chosen = [line for line in lines if "choice" in line]
    heights = (3, 2) if chosen else (1,)
    with matplotlib.style.context("llama_tut.book"):
        figure = Figure((7.2, 6.4 if chosen else 4.0), layout="constrained")
        shape = dict(squeeze=False, sharex=True, height_ratios=heights)
        axes = figure.subplots(len(heights), **shape)[:, 0]
        draw_losses(axes[0], lines, {**floors(info), **(more or {})})
        if chosen:
            about = json.loads((Path(folder) / "config.json").read_text())
            draw_choice(axes[1], chosen, about["choice"])
        axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[-1].set(xlabel="tokens")
    return figure


def draw_level(ax, text, height, va="center"):
    """A dashed line across a panel, with its text at the right edge."""
    ax.axhline(height, color="0.4", lw=1, ls="--", zorder=0)
    where = dict(xycoords=("axes fraction", "data"), fontsize=9)
    ax.annotate(text, (1.01, height), va=va, **where)


def draw_losses(ax, lines, levels):
    """Training and validation loss of a run over tokens."""
    for name, key, style in (
        ("training", "loss", dict(lw=0.7, alpha=0.7)),
        ("validation", "val_loss", dict(marker="o", ms=4)),
    ):
        pairs = [(s["tokens"], s[key]) for s in lines if key in s]
        ax.plot(*zip(*pairs, strict=True), label=name, **style)
    for name, nats in levels.items():
        draw_level(ax, f"{name} {nats:.2f}", nats)
    ax.set(yscale="log", ylabel="nats a token")
    low, high = ax.get_ylim()
    ticks = [t for t in (0.7, 1, 1.5, 2, 3, 4, 5, 6, 8) if low < t < high]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def draw_choice(ax, lines, baselines):
    """Accuracy of continuation choice, above what needs no model."""
    tokens = [line["tokens"] for line in lines]
    ax.plot(tokens, [line["choice"] for line in lines], "o-", ms=4)
    names = sorted(baselines, key=baselines.get)
    places = ("center", "top", "bottom")  # the upper two are close
    for name, va in zip(names, places, strict=True):
        draw_level(ax, f"{name} {baselines[name]:.0%}", baselines[name], va)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(ylabel="choice, right")


def report(run, nats):
    """Print the validation loss beside its floors."""
    table = {"this model": nats, **floors(run.info)}
    all_rows = len(run.validation)
    rows = min(run.config.eval_rows, all_rows)
    say(run.ranks, f"\nvalidation text, {rows:,} of {all_rows:,} rows:")
    say(run.ranks, f"{'':12}nats a token  bits a byte")
    for name, value in table.items():
        bits = run.info.bits_per_byte(value)
        say(run.ranks, f"{name:12}{value:12.4f}{bits:13.4f}")


def report_choice(run, right):
    """Print the accuracy on the items beside what it must be above."""
    swapped = run.choices.contexts.roll(1, 0)
    swapped = measure_choice(run, run.choices._replace(contexts=swapped))[0]
    table = {"this model": right, "context of another item": swapped}
    say(run.ranks, f"\ncontinuation choice, {run.config.choice:,} items:")
    for name, value in {**table, **run.baselines}.items():
        say(run.ranks, f"{name:24}{value:6.1%}")


def write_samples(run):
    """Print a few texts of the model, and keep them in samples.txt."""
    config, end = run.config, run.info.end_of_text
    tokenizer = read_tokenizer(Path(config.data) / "tokenizer")
    prompt = [end, *tokenizer.encode(config.prompt).ids]
    ids = torch.tensor([prompt], device=run.ranks.device)
    room = config.sequence_length - len(prompt)
    source = torch.Generator(run.ranks.device).manual_seed(config.seed)
    texts = []
    run.model.eval()
    for number in range(1, config.samples + 1 if room > 0 else 0):
        how = dict(temperature=0.8, top_k=50, stop_tokens=(end,))
        length = min(config.sample_tokens, room)
        out = generate(run.model, ids, length, generator=source, **how)
        text = tokenizer.decode(out[0].tolist())
        texts.append(f"--- sample {number} ---\n{text}\n")
        say(run.ranks, f"\n{texts[-1]}".rstrip())
    run.model.train()
    (Path(config.out) / "samples.txt").write_text("\n".join(texts))


def finish(run, ended):
    """Rank 0's last work; the last line of metrics.jsonl."""
    folder = Path(run.config.out)
    if run.recorder.problem:
        raise InputError(run.recorder.problem)
    run.recorder.bar.close()
    lines = read_metrics(folder / "metrics.jsonl")
    try:
        if lines:
            curves = draw_curves(folder, run.info)
            curves.savefig(folder / "curves.png", dpi=150)
        if ended:
            report(run, lines[-1].get("val_loss", math.nan))
            if "choice" in lines[-1] and run.choices:
                report_choice(run, lines[-1]["choice"])
            write_samples(run)
            save_pretrained(run.model, folder / "model", load_tokenizer(run))
            say(run.ranks, f"\nwrote {folder / 'model'}")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    return lines[-1] if lines else None


# Train


def train(config, build_model=build_llama):
    """Train a model as `config` says; every rank calls this.

    Args:
        build_model: called with (config, info); gives a model that returns
            the mean loss when called with ids and `targets`.

    Returns: the last line of metrics.jsonl.
    Raises: InputError for all that the options or the data get wrong.
    """
    for name in ("data", "out"):
        if not getattr(config, name):
            raise InputError(f"{flag(name)} is missing: name a folder")
    with stop_signals() as signals:
        info = load_dataset_info(config.data)
        ranks = start(config.device)
        try:
            announce(config, info, ranks, build_model)
            with claimed(config, ranks):
                run = prepare_run(config, info, ranks, build_model)
                return carry_out(run, signals)
        finally:
            stop()


def carry_out(run, signals):
    """Train a prepared run to its end, or to a signal."""
    if run.config.choice:
        on_rank_zero(run.ranks, open_choices, run)
    on_rank_zero(run.ranks, open_recorder, run)
    try:
        if run.config.hellaswag:  # better wrong now than after an hour
            on_rank_zero(run.ranks, measure_hellaswag, run, 2)
        ended = loop(run, signals)
        if not ended:
            say(run.ranks, f"stopped at step {run.step:,}: --resume goes on")
        return on_rank_zero(run.ranks, finish, run, ended)
    finally:
        if run.recorder is not None:
            run.recorder.close()


def open_recorder(run):
    """Rank 0: note how the run was started, and open its metrics."""
    folder = Path(run.config.out)
    about = {
        "config": asdict(run.config),
        "command": sys.argv,
        "torch": torch.__version__,
        "data": asdict(run.info),
        "choice": run.baselines,
    }
    try:
        write_json(folder / "config.json", about)
        run.recorder = Recorder(folder, run.step, run.config.steps)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
