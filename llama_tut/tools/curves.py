"""Curves: a picture, a table and a few texts of a run."""

import math
from pathlib import Path

import torch
from matplotlib.ticker import EngFormatter, PercentFormatter

from llama_tut.tools.files import InputError, read_json
from llama_tut.tools.runs import read_metrics
from llama_tut.tools.tokenizers import read_tokenizer


def draw_curves(folder, levels):
    """A Figure of a run's metrics.jsonl: losses, and choice if measured.

    Args:
        levels: horizontal lines, {name: nats}.
    """
    # Half a second that the ranks which draw nothing need not pay.
    import matplotlib.style
    from matplotlib.figure import Figure

    lines = read_metrics(Path(folder) / "metrics.jsonl")
    chosen = [line for line in lines if "choice" in line]
    heights = (3, 2) if chosen else (1,)
    with matplotlib.style.context("llama_tut.book"):
        figure = Figure((7.2, 6.4 if chosen else 4.0), layout="constrained")
        axes = figure.subplots(
            len(heights), squeeze=False, sharex=True, height_ratios=heights
        )[:, 0]
        draw_losses(axes[0], lines, levels)
        if chosen:
            about = read_json(Path(folder) / "config.json")
            draw_choice(axes[1], chosen, about["choice"])
        axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[-1].set(xlabel="tokens")
    return figure


def draw_level(ax, text, height, va="center"):
    """A dashed line across a panel, with its text at the right edge."""
    ax.axhline(height, color="0.4", lw=1, ls="--", zorder=0)
    where = ("axes fraction", "data")
    ax.annotate(text, (1.01, height), xycoords=where, va=va, fontsize=9)


def draw_losses(ax, lines, levels):
    """Training and validation loss of a run over tokens."""
    for name, key, style in (
        ("training", "loss", dict(lw=0.7, alpha=0.7)),
        ("validation", "val_loss", dict(marker="o", ms=4)),
    ):
        tokens = [line["tokens"] for line in lines if key in line]
        values = [line[key] for line in lines if key in line]
        ax.plot(tokens, values, label=name, **style)
    for name, nats in levels.items():
        draw_level(ax, f"{name} {nats:.2f}", nats)
    ax.set(yscale="log", ylabel="nats per token")
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


def report(line, levels, bits_per_byte, items=0, choice_levels=None):
    """Lines of text: losses and accuracies of choice, beside baselines.

    Args:
        line: the run's last line of metrics.jsonl.
        levels: {name: nats} of what needs no model.
        bits_per_byte: turns nats per token into bits per byte.
        items, choice_levels: of continuation choice, {name: accuracy}.
    """
    yield f"{'':12}nats per token  bits per byte"
    nats = {"this model": line.get("val_loss", math.nan), **levels}
    for name, value in nats.items():
        yield f"{name:12}{value:12.4f}{bits_per_byte(value):13.4f}"
    if choice_levels and "choice" in line:
        yield f"\ncontinuation choice, {items:,} items:"
        rights = {"this model": line["choice"], **choice_levels}
        for name, value in rights.items():
            yield f"{name:24}{value:6.1%}"


def print_report(run, line, levels, control=None):
    """Say a run's last measurements beside what needs no model.

    Args:
        line, levels: as those of `report`.
        control: accuracy of choice with the context of another item.
    """
    accuracies = {"context of another item": control, **run.baselines}
    rows = min(run.config.eval_rows, len(run.validation))
    run.say(f"\n{rows:,} of {len(run.validation):,} rows of validation text:")
    for text in report(
        line,
        levels,
        run.info.bits_per_byte,
        run.config.choice,
        accuracies if run.choices else None,
    ):
        run.say(text)


def write_results(run, ended, levels, control, save_model, generate):
    """Rank 0's last work; the last line of metrics.jsonl.

    Args:
        run: it holds the whole model if it has `ended`.
        levels, control: as those of `print_report`.
        save_model: (model, folder, tokenizer) writes the model's folder.
        generate: that of chapter 11.

    Raises: InputError: the folder cannot be written.
    """
    folder = Path(run.config.out)
    run.recorder.flush()
    run.recorder.bar.close()
    lines = read_metrics(folder / "metrics.jsonl")
    try:
        if ended:
            save_model(run.model, folder / "model", run.tokenizer)
        if lines:
            draw_curves(folder, levels).savefig(folder / "curves.png", dpi=150)
        if ended:
            print_report(run, lines[-1], levels, control)
            write_samples(run, generate)
            run.say(f"\nwrote {folder / 'model'}")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    return lines[-1] if lines else None


def write_samples(run, generate):
    """Say a few texts of a run's model, and keep them in samples.txt.

    Args:
        generate: that of chapter 11.
    """
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
