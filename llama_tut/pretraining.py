# From notebooks/18_pretraining.ipynb by scripts/export.py: edit the notebook.
"""Pretraining: a whole run, from options to a folder that can be taken away.

Letters: B batch, T time, V vocabulary, W ranks, N parameters.
"""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from llama_tut.checkpoint import (
    check_shapes,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from llama_tut.distributed import Layout, warm_up_ddp_buckets
from llama_tut.generate import generate
from llama_tut.hellaswag import (
    accuracy,
    encode,
    read_examples,
    score,
    score_rows,
)
from llama_tut.loader import ReadAhead, ShardLoader
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer, learning_rate_at
from llama_tut.tools.choice import (
    choice_accuracy,
    choice_scores,
    exchange_contexts,
    read_choices,
)
from llama_tut.tools.compilation import compile_model
from llama_tut.tools.curves import write_results
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.devices import autocast, matmul_dtype, peak_flops
from llama_tut.tools.files import read_json, require
from llama_tut.tools.memory import announce
from llama_tut.tools.options import (
    changes,
    check_same_run,
    gradient_accumulation_steps,
    llama_config,
    saved_state,
)
from llama_tut.tools.predictions import check_items
from llama_tut.tools.ranks import (
    any_rank,
    mean_over_ranks,
    on_rank_zero,
    shared_errors,
    start,
    stop,
    wait_for_all,
)
from llama_tut.tools.runs import (
    Run,
    check_finite,
    due,
    lock_folder,
    open_recorder,
    print0,
    stop_signals,
    was_measured,
)
from llama_tut.tools.tokenizers import encode_prompt, transformers_tokenizer
from llama_tut.trainer import baseline_losses, evaluate, training_steps
from llama_tut.weights import save_pretrained

# The model of a run


def build_llama(config, info):
    """A LLaMA with random weights for these options and this data."""
    return LlamaForCausalLM(llama_config(config, info))


def build_text_loader(config, info, ranks, split):
    """Rows of the "train" or the "val" tokens for one rank."""
    B, T = config.micro_batch_size, config.sequence_length
    if split == "train":
        rank, W, seed = ranks.rank, ranks.world_size, config.seed
        return ShardLoader(config.data, "train", B, T, rank, W, seed)
    loader = ShardLoader(config.data, "val", 1, T, shuffle=False)
    loader.batch_size = min(B, len(loader))
    return loader


# The whole run on one screen


def train(
    config,
    build_model=build_llama,
    prepare_model=None,
    score_batch=score_rows,
    build_loader=build_text_loader,
    after_step=None,
    save_model=save_pretrained,
    build_layout=Layout,
):
    """Train a model as `config` says; every rank calls this.

    Args: build_model(config, info), prepare_model(model, device, dtype) and
        build_layout(config, ranks) before the first step; build_loader(config,
        info, ranks, split), whose batches are tensors, the targets last;
        score_batch for HellaSwag's rows; after_step(model, line), which may
        change buffers and add numbers; save_model(model, folder, tokenizer).

    Returns: the last line of metrics.jsonl.
    Raises: InputError for all that the options or the data get wrong.
    """
    require(config.data, "--data is missing: name a folder")
    require(config.out, "--out is missing: name a folder")
    info, ranks = load_dataset_info(config.data), start(config.device)
    say, lock = partial(print0, ranks.rank), nullcontext()
    try:
        layout = build_layout(config, ranks)
        with shared_errors():  # rank 0 holds the folder for all ranks
            announce(config, info, ranks, build_model, say, **layout.memory)
            if ranks.rank == 0:
                lock = lock_folder(Path(config.out), config.resume)
        with lock, stop_signals() as signals:
            run = prepare_run(
                config, info, layout, build_model, prepare_model, build_loader
            )
            run.score_batch, run.after_step = score_batch, after_step
            open_what_the_end_needs(run)
            on_rank_zero(ranks, open_recorder, run)
            try:
                return finish(run, run_steps(run, signals), save_model)
            finally:
                if run.recorder is not None:
                    run.recorder.close()
    finally:
        stop()


# What a run holds


def prepare_run(
    config, info, layout, build_model, prepare_model, build_loader
):
    """Model, optimizer and data of a run, at its first step or resumed."""
    ranks, say = layout.ranks, partial(print0, layout.ranks.rank)
    torch.manual_seed(config.seed)
    with shared_errors(ranks.gloo_group):
        loader = build_loader(config, info, layout.readers, "train")
        validation = build_loader(config, info, layout.readers, "val")
        example = loader.batch_at(0)  # any batch would do
    dtype = matmul_dtype(config.dtype, ranks.device)
    cast = partial(autocast, ranks.device, dtype)
    build = partial(build_model, config, info)
    model = layout.build(build)
    if prepare_model is not None:
        prepare_model(model, ranks.device, dtype)
    model = fast = layout.place(model, dtype)
    example = [tensor.to(ranks.device) for tensor in example]
    if config.compile:
        fast = compile_model(model, example, ranks, cast, say)
    wait_for_all(ranks)  # ranks finish compiling at different times
    parallel = layout.wrap(fast)
    optimizer = build_optimizer(
        model,
        config.optimizer,
        config.learning_rate,
        config.weight_decay,
        (config.beta1, config.beta2),
    )
    warm_up_ddp_buckets(parallel, *example, cast=cast)
    run = Run(
        config=config, info=info, ranks=ranks, layout=layout, say=say,
        model=model, build=build, parallel=parallel, optimizer=optimizer,
        autocast=cast, loader=loader, validation=validation,
    )  # fmt: skip
    if config.resume:
        resume(run)
    return run


# The loop


def speed(run, seconds):
    """Tokens so far, tokens per second, and MFU where the peak is known."""
    config = run.config
    tokens_per_second = config.tokens_per_step / seconds
    line = {
        "tokens_per_second": round(tokens_per_second, 1),
        "tokens": run.step * config.tokens_per_step,
    }
    peak = peak_flops(run.ranks.device)
    if peak:
        flops = run.model.flops_per_token(config.sequence_length)
        line["mfu"] = tokens_per_second * flops / (peak * run.ranks.world_size)
    return line


def run_steps(run, signals):
    """Train until the last step or a signal; whether the end was reached."""
    config, ranks, warmup = run.config, run.ranks, run.config.warmup_steps
    learning_rate = partial(
        learning_rate_at, peak=config.learning_rate, steps=config.steps,
        warmup_steps=config.steps // 20 if warmup is None else warmup,
        schedule=config.schedule, final_fraction=config.final_fraction,
    )  # fmt: skip
    for line in training_steps(
        run.parallel,
        run.optimizer,
        ReadAhead(run.loader).next_batch,
        learning_rate,
        config.steps,
        first=run.step,
        k=gradient_accumulation_steps(config, run.layout.readers.world_size),
        max_norm=config.max_norm,
        clip=run.layout.clip,
        autocast=run.autocast,
        sync=partial(run.layout.sync, run.parallel),
        mean=mean_over_ranks,
    ):
        run.step = line["step"]
        line |= speed(run, line.pop("seconds"))
        if run.after_step is not None:
            run.after_step(run.model, line)
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


# Measuring


def measure(run):
    """Validation loss, and what else is wanted, for metrics.jsonl."""
    nats = evaluate(
        run.model,
        run.validation,
        min(run.config.eval_rows, len(run.validation)),
        rank=run.layout.readers.rank,
        world_size=run.layout.readers.world_size,
        autocast=run.autocast,
        mean=lambda sums: mean_over_ranks(sums.to(run.ranks.device)),
    )
    require(
        math.isfinite(nats),
        f"the validation loss is {nats} at step {run.step}: go on from the "
        "last checkpoint with --resume and a smaller --learning-rate",
    )
    bits = run.info.bits_per_byte(nats)
    line = {"val_loss": nats, "bits_per_byte": bits}
    text = f"validation {nats:.4f} nats per token, {bits:.4f} bits per byte"
    if run.examples:
        line["hellaswag"], error = measure_hellaswag(run, run.examples)
        text += f", HellaSwag {line['hellaswag']:.1%} ± {error:.1%}"
    if run.choices:
        line["choice"], error = measure_choice(run, run.choices)
        text += f", choice {line['choice']:.1%} ± {error:.1%}"
    run.say(f"step {run.step:,}: {text}")
    return line


@contextmanager
def evaluating(run):
    """The model in eval mode, its products in the run's dtype."""
    run.model.eval()
    try:
        with run.autocast():
            yield run.model
    finally:
        run.model.train()


def measure_hellaswag(run, examples):
    """Accuracy by summed log-probability, and its standard error."""
    with evaluating(run) as model:
        return accuracy(
            score(model, run.tokenizer, examples, score_batch=run.score_batch)
        )


def measure_choice(run, choices):
    """Accuracy on items of continuation choice, and its standard error."""
    with evaluating(run) as model:
        scores = choice_scores(model, choices, run.info.end_of_text)
    return choice_accuracy(scores, choices.answers)


# Before the first step


def open_what_the_end_needs(run):
    """Tokenizer, prompt, examples and items: better wrong now than later."""
    config, ranks = run.config, run.ranks
    folder = Path(config.data) / "tokenizer"
    most = config.sequence_length if config.samples else math.inf
    with shared_errors(ranks.gloo_group):
        run.prompt = encode_prompt(
            folder, config.prompt, run.info.end_of_text, most
        )
        if ranks.rank == 0 or config.hellaswag:
            run.tokenizer = transformers_tokenizer(folder)
    if config.hellaswag:
        source = None if config.hellaswag == "own" else config.hellaswag
        run.examples = on_rank_zero(
            ranks, read_examples, source, config.hellaswag_limit
        )
        with shared_errors(ranks.gloo_group):
            items = [
                encode(run.tokenizer, example) for example in run.examples
            ]
            c = run.model.config
            check_items(items, c.max_position_embeddings, c.vocab_size)
        measure_hellaswag(run, run.examples[:2])
    if config.choice:
        run.choices, run.baselines = on_rank_zero(
            ranks, read_choices, config.data, config.choice
        )
        if run.step == 0:
            right, error = measure_choice(run, run.choices)
            run.say(f"step 0: choice {right:.1%} ± {error:.1%}, untrained")


# Saved and resumed


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
        check_same_run(path, state, saved_state(run))
        require(
            state["step"] <= run.config.steps,
            f"--steps {run.config.steps}: {path} is further already",
        )
        check_shapes(path, run.model)
    load_checkpoint(path, run.model, run.optimizer, ranks)
    with shared_errors(ranks.gloo_group):
        check_finite(
            run.model,
            run.optimizer,
            f"{path} holds",
            f"delete {path} and --resume",
        )
    run.step, run.loader.position = state["step"], state["position"]
    run.say(f"resumed at step {run.step:,} from {path}")
    for line in changes(state, run.config):
        run.say(line)


def save(run):
    """Write a checkpoint; all ranks call it.

    Raises: InputError, on all ranks, when it cannot be written or holds a
        number that is not finite.
    """
    with shared_errors(run.ranks.gloo_group):
        if run.ranks.rank == 0:
            run.recorder.flush()
    save_checkpoint(
        Path(run.config.out) / "checkpoints",
        run.step,
        run.model,
        run.optimizer,
        saved_state(run),
        run.config.keep_checkpoints,
        run.ranks,
    )


# The end of a run


def finish(run, ended, save_model):
    """All ranks find the whole model, then rank 0 writes what is left."""
    control, folder = None, Path(run.config.out)
    if ended and not on_rank_zero(run.ranks, was_measured, folder):
        # Stopped at this step, and resumed with the same --steps.
        tokens = run.step * run.config.tokens_per_step
        line = {"step": run.step, "tokens": tokens, **measure(run)}
        if run.recorder is not None:
            run.recorder.write(line)
    if ended and run.choices:
        control, _ = measure_choice(run, exchange_contexts(run.choices))
    if ended:
        run.model = run.layout.whole(run.model, run.build)
    levels = baseline_losses(run.info)
    return on_rank_zero(
        run.ranks, write_results, run, ended, levels, control,
        save_model, generate,
    )  # fmt: skip
