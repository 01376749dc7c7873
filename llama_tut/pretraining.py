# From notebooks/18_pretraining.ipynb by scripts/export.py: edit the notebook.
"""Pretraining: a whole run, from options to a folder that can be taken away.

Letters: B batch, T time, V vocabulary, W ranks, N parameters.
"""

import math
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from llama_tut.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
)
from llama_tut.distributed import micro_step_sync, warm_up_ddp_buckets, wrap
from llama_tut.generate import generate
from llama_tut.hellaswag import accuracy, read_examples, score, score_rows
from llama_tut.loader import ShardLoader
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer, learning_rate_at
from llama_tut.tools import memory
from llama_tut.tools.choice import (
    Choices,
    choice_accuracy,
    choice_scores,
    exchange_contexts,
    read_choices,
)
from llama_tut.tools.compilation import compile_model
from llama_tut.tools.curves import draw_curves, report
from llama_tut.tools.devices import autocast, matmul_dtype, peak_flops
from llama_tut.tools.files import InputError, read_json, require
from llama_tut.tools.options import (
    TrainConfig,
    check_same_run,
    flag,
    gradient_accumulation_steps,
    llama_config,
)
from llama_tut.tools.prepare import DatasetInfo, load_dataset_info
from llama_tut.tools.ranks import (
    Ranks,
    any_rank,
    gather_objects,
    mean_over_ranks,
    on_rank_zero,
    shared_errors,
    start,
    stop,
    wait_for_all,
)
from llama_tut.tools.runs import (
    Recorder,
    check_finite,
    due,
    lock_folder,
    print0,
    read_metrics,
    stop_signals,
)
from llama_tut.tools.tokenizers import (
    encode_text,
    read_tokenizer,
    transformers_tokenizer,
)
from llama_tut.trainer import baseline_losses, evaluate, training_steps
from llama_tut.weights import save_pretrained

# The model of a run


def build_llama(config, info):
    """A LLaMA with random weights for these options and this data."""
    return LlamaForCausalLM(llama_config(config, info))


# What a run holds


@dataclass
class Run:
    """What the functions of a run share."""

    config: TrainConfig
    info: DatasetInfo
    ranks: Ranks
    model: torch.nn.Module  # as built: evaluated, sampled, saved
    parallel: torch.nn.Module  # what a step calls: compiled, with DDP
    optimizer: torch.optim.Optimizer
    loader: ShardLoader
    validation: ShardLoader
    autocast: Callable
    step: int = 0
    tokenizer: object = None  # of transformers, where it is needed
    prompt: list = field(default_factory=list)  # ids that samples begin with
    examples: list | None = None  # of HellaSwag
    score_batch: Callable = score_rows  # how they are scored
    choices: Choices | None = None
    baselines: dict = field(default_factory=dict)  # of the choices
    recorder: Recorder | None = None  # on rank 0
    say: Callable = print  # one line, on rank 0


def prepare_run(config, info, ranks, build_model, prepare_model, say):
    """Model, optimizer and data of a run, at its first step or resumed."""
    B, T = config.micro_batch_size, config.sequence_length
    device = ranks.device
    torch.manual_seed(config.seed)
    with shared_errors(ranks.gloo_group):
        loader = ShardLoader(
            config.data,
            "train",
            B,
            T,
            ranks.rank,
            ranks.world_size,
            config.seed,
        )
        validation = ShardLoader(config.data, "val", 1, T, shuffle=False)
        validation.batch_size = min(B, len(validation))
    dtype = matmul_dtype(config.dtype, device)
    cast = partial(autocast, device, dtype)
    model = build_model(config, info).to(device)
    if prepare_model is not None:
        prepare_model(model, device, dtype)
    ids = torch.zeros((B, T), dtype=torch.int64, device=device)
    fast = model
    if config.compile:
        fast = compile_model(model, ids, ranks, cast, say)
    wait_for_all(ranks)  # ranks finish compiling at different times
    parallel = wrap(fast, ranks)
    optimizer = build_optimizer(
        model,
        config.optimizer,
        config.learning_rate,
        config.weight_decay,
        (config.beta1, config.beta2),
    )
    warm_up_ddp_buckets(parallel, ids, ids, cast)
    run = Run(
        config, info, ranks, model, parallel, optimizer, loader, validation,
        cast, say=say,
    )  # fmt: skip
    if config.resume:
        resume(run)
    return run


# Work first, check first


def open_what_the_end_needs(run):
    """Tokenizer, prompt, examples and items: better wrong now than later."""
    config, ranks = run.config, run.ranks
    folder = Path(config.data) / "tokenizer"
    with shared_errors(ranks.gloo_group):
        run.prompt = [
            run.info.end_of_text, *encode_text(folder, config.prompt)
        ]  # fmt: skip
        require(
            len(run.prompt) < config.sequence_length or not config.samples,
            f"--prompt has {len(run.prompt)} tokens, and the model reads "
            f"{config.sequence_length}: take a shorter one",
        )
        if ranks.rank == 0 or config.hellaswag:
            run.tokenizer = transformers_tokenizer(folder)
    if config.hellaswag:
        source = None if config.hellaswag == "own" else config.hellaswag
        run.examples = on_rank_zero(
            ranks, read_examples, source, config.hellaswag_limit
        )
        with shared_errors(ranks.gloo_group):
            measure_hellaswag(run, run.examples[:2])
    if config.choice:
        run.choices, run.baselines = on_rank_zero(
            ranks, read_choices, config.data, config.choice
        )
        if run.step == 0:
            right, error = measure_choice(run, run.choices)
            run.say(f"step 0: choice {right:.1%} ± {error:.1%}, untrained")


# Saved and resumed

SAME = ("sequence_length", "tokens_per_step", "seed", "optimizer")


def saved_state(run):
    """The plain values of a checkpoint, as they are now."""
    to_hf = getattr(run.model.config, "to_hf", dict)
    return {
        "position": run.loader.position,
        "world_size": run.ranks.world_size,
        "data": run.info.hash,
        "model": to_hf(),
        "config": asdict(run.config),
    }


def resume(run):
    """Put the newest valid checkpoint into the run; none: start at 0."""
    folder, ranks = Path(run.config.out) / "checkpoints", run.ranks
    path = on_rank_zero(ranks, latest_checkpoint, folder)
    if path is None:
        run.say(f"no checkpoint in {folder}: starting at step 0")
        return
    with shared_errors(ranks.gloo_group):
        require(path.is_dir(), f"rank {ranks.rank} does not see {path}")
        state = read_json(path / "state.json")
        check_same_run(path, state, saved_state(run), SAME)
        require(
            state["step"] <= run.config.steps,
            f"--steps {run.config.steps}: {path} is further already",
        )
        load_checkpoint(path, run.model, run.optimizer, ranks.rank)
        check_finite(
            run.model,
            run.optimizer,
            f"{path} holds",
            f"delete {path} and --resume",
        )
    run.step, run.loader.position = state["step"], state["position"]
    run.say(f"resumed at step {run.step:,} from {path}")
    for name, new in asdict(run.config).items():
        old = state["config"].get(name, new)
        if old != new and name not in ("data", "out", "resume"):
            run.say(f"{flag(name)} was {old}, from here on it is {new}")


def save(run):
    """Write a checkpoint; all ranks call it, rank 0 writes.

    Raises: InputError, on all ranks, when it cannot be written or holds a
        number that is not finite.
    """
    states = gather_objects(random_states(), run.ranks.gloo_group)
    on_rank_zero(run.ranks, write_checkpoint, run, states)


def write_checkpoint(run, states):
    """Rank 0's part of `save`: first the metrics, then the checkpoint."""
    run.recorder.flush()
    save_checkpoint(
        Path(run.config.out) / "checkpoints",
        run.step,
        run.model,
        run.optimizer,
        saved_state(run),
        run.config.keep_checkpoints,
        states,
    )


# Measuring


def measure(run):
    """Validation loss, and what else is wanted, for metrics.jsonl."""
    rows = min(run.config.eval_rows, len(run.validation))
    nats = evaluate(
        run.model,
        run.validation,
        rows,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        autocast=run.autocast,
        mean=lambda sums: mean_over_ranks(sums.to(run.ranks.device)),
    )
    require(
        math.isfinite(nats),
        f"the validation loss is {nats} at step {run.step}: go on from the "
        "last checkpoint with --resume and a smaller --learning-rate",
    )
    line = {"val_loss": nats, "bits_per_byte": run.info.bits_per_byte(nats)}
    text = f"validation {nats:.4f} nats a token, "
    text += f"{line['bits_per_byte']:.4f} bits a byte"
    if run.examples:
        line["hellaswag"], error = measure_hellaswag(run, run.examples)
        text += f", HellaSwag {line['hellaswag']:.1%} ± {error:.1%}"
    if run.choices:
        line["choice"], error = measure_choice(run, run.choices)
        text += f", choice {line['choice']:.1%} ± {error:.1%}"
    run.say(f"step {run.step:,}: {text}")
    return line


@contextmanager
def measuring(run):
    """The model as it is evaluated: in eval mode, under autocast."""
    run.model.eval()
    with run.autocast():
        yield run.model
    run.model.train()


def measure_hellaswag(run, examples):
    """Accuracy by summed log-probability, and its standard error."""
    with measuring(run) as model:
        predictions = score(
            model, run.tokenizer, examples, score_batch=run.score_batch
        )
    return accuracy(predictions)


def measure_choice(run, choices):
    """Accuracy on items of continuation choice, and its standard error."""
    with measuring(run) as model:
        scores = choice_scores(model, choices, run.info.end_of_text)
    return choice_accuracy(scores, choices.answers)


# The end of a run


def finish(run, ended):
    """Rank 0's last work; the last line of metrics.jsonl.

    The model comes first, since it cannot be made again from other files.
    """
    folder = Path(run.config.out)
    run.recorder.flush()
    run.recorder.bar.close()
    lines = read_metrics(folder / "metrics.jsonl")
    try:
        if ended:
            save_pretrained(run.model, folder / "model", run.tokenizer)
        if lines:
            curves = draw_curves(folder, baseline_losses(run.info))
            curves.savefig(folder / "curves.png", dpi=150)
        if ended:
            print_report(run, lines[-1])
            write_samples(run)
            run.say(f"\nwrote {folder / 'model'}")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    return lines[-1] if lines else None


def print_report(run, line):
    """Print the last measurements beside what needs no model."""
    accuracies = {}
    if run.choices:
        control, _ = measure_choice(run, exchange_contexts(run.choices))
        accuracies = {"context of another item": control, **run.baselines}
    rows = min(run.config.eval_rows, len(run.validation))
    run.say(f"\n{rows:,} of {len(run.validation):,} rows of validation text:")
    for text in report(
        line,
        baseline_losses(run.info),
        run.info.bits_per_byte,
        run.config.choice,
        accuracies,
    ):
        run.say(text)


def write_samples(run):
    """Print a few texts of the model, and keep them in samples.txt."""
    config, end = run.config, run.info.end_of_text
    tokenizer = read_tokenizer(Path(config.data) / "tokenizer")
    ids = torch.tensor([run.prompt], device=run.ranks.device)
    length = min(config.sample_tokens, config.sequence_length - ids.shape[1])
    generator = torch.Generator(run.ranks.device).manual_seed(config.seed)
    texts = []
    run.model.eval()
    for number in range(1, config.samples + 1):
        out = generate(
            run.model, ids, length, generator=generator, temperature=0.8,
            top_k=50, stop_tokens=(end,),
        )  # fmt: skip
        text = tokenizer.decode(out[0].tolist())
        texts.append(f"--- sample {number} ---\n{text}\n")
        run.say(f"\n{texts[-1]}".rstrip())
    run.model.train()
    path = Path(config.out) / "samples.txt"
    path.write_text("\n".join(texts), encoding="utf-8")


# The whole run


def run_steps(run, signals):
    """Train until the last step or a signal; whether the end was reached."""
    config, ranks, warmup = run.config, run.ranks, run.config.warmup_steps
    steps = training_steps(
        run.parallel,
        run.optimizer,
        run.loader.next_batch,
        partial(
            learning_rate_at,
            peak=config.learning_rate,
            steps=config.steps,
            warmup_steps=config.steps // 20 if warmup is None else warmup,
            schedule=config.schedule,
            final_fraction=config.final_fraction,
        ),
        config.steps,
        first=run.step,
        k=gradient_accumulation_steps(config, ranks.world_size),
        max_norm=config.max_norm,
        autocast=run.autocast,
        sync=partial(micro_step_sync, run.parallel),
        mean=mean_over_ranks,
    )
    for line in steps:
        run.step = line["step"]
        line |= speed(run, line.pop("seconds"))
        problem = run.recorder is not None and run.recorder.problem
        stopping = any_rank(bool(signals or problem), ranks.device)
        last = run.step == config.steps
        if last or due(run.step, config.eval_every):
            line |= measure(run)
        if run.recorder is not None:
            run.recorder.write(line)
        if last or stopping or due(run.step, config.checkpoint_every):
            save(run)
        if stopping and not last:
            run.say(f"stopped at step {run.step:,}: --resume goes on")
            return False
    return True


def speed(run, seconds):
    """Tokens so far, tokens a second, and MFU where the peak is known."""
    config = run.config
    rate = config.tokens_per_step / seconds
    line = {
        "tokens_per_second": round(rate, 1),
        "tokens": run.step * config.tokens_per_step,
    }
    peak = peak_flops(run.ranks.device)
    if peak:
        flops = rate * run.model.flops_per_token(config.sequence_length)
        line["mfu"] = flops / (peak * run.ranks.world_size)
    return line


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
        run.recorder = Recorder(folder, about, run.step, run.config.steps)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error


def announce(config, info, ranks, build_model, say):
    """Print what will be done and what it needs; refuse what cannot fit."""
    with torch.device("meta"):  # shapes, no numbers
        model = build_model(config, info)
    dtype = matmul_dtype(config.dtype, ranks.device)
    for line in memory.describe(
        config, info, model, ranks.world_size, ranks.device, dtype
    ):
        say(line)


def train(
    config,
    build_model=build_llama,
    prepare_model=None,
    score_batch=score_rows,
):
    """Train a model as `config` says; every rank calls this.

    Args:
        build_model: called with (config, info); gives a model that returns
            the mean loss when called with ids and `targets`.
        prepare_model: called with (model, device, dtype) before the first
            step, to swap fast parts into the model; None leaves it plain.
        score_batch: how HellaSwag's rows are scored.
    Returns: the last line of metrics.jsonl.
    Raises: InputError for all that the options or the data get wrong.
    """
    for name in ("data", "out"):
        require(
            getattr(config, name), f"{flag(name)} is missing: name a folder"
        )
    info = load_dataset_info(config.data)
    ranks = start(config.device)
    say = partial(print0, ranks.rank)
    lock = nullcontext()
    try:
        announce(config, info, ranks, build_model, say)
        with shared_errors():  # rank 0 holds the folder for all ranks
            if ranks.rank == 0:
                lock = lock_folder(Path(config.out), config.resume)
        with lock, stop_signals() as signals:
            run = prepare_run(
                config, info, ranks, build_model, prepare_model, say
            )
            run.score_batch = score_batch
            open_what_the_end_needs(run)
            on_rank_zero(ranks, open_recorder, run)
            try:
                ended = run_steps(run, signals)
                return on_rank_zero(ranks, finish, run, ended)
            finally:
                if run.recorder is not None:
                    run.recorder.close()
    finally:
        stop()
