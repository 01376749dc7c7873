"""Plan one training step of a model on GPUs that are not there.

python scripts/plan.py --model llama3-70b --gpus 64 --tensor-parallel 8
python scripts/plan.py --model RUN/model --gpus 8 --recompute --plot plan.png
"""

from collections import Counter
from pathlib import Path

import torch

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM, parameter_count
from llama_tut.plan import Setup, make_plan
from llama_tut.tools import memory
from llama_tut.tools.cli import Parser, run
from llama_tut.tools.devices import without_memory
from llama_tut.tools.files import InputError, read_json, require, write_json
from llama_tut.tools.memory import in_bytes
from llama_tut.tools.plans import GPUS, LLAMA3, short
from llama_tut.tools.pretrained import refuse_run
from llama_tut.tools.timeline import draw_timeline


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="NAME|FOLDER",
        help=f"{', '.join(LLAMA3)}, or a folder with a config.json",
    )
    add("--gpus", type=int, required=True, help="GPUs of the run")
    add("--gpu", choices=list(GPUS), default="H100", help="their kind")
    add("--tensor-parallel", type=int, default=1, help="GPUs that share a row")
    add("--sequence-length", type=int, default=8192, help="tokens of a row")
    add("--micro-batch-size", type=int, default=1, help="rows of a GPU")
    add("--recompute", action="store_true", help="keep no activations")
    add("--plain", action="store_true", help="without chapter 19's parts")
    add("--tokens", type=float, default=15e12, help="tokens of the run")
    add("--price", type=float, default=2.0, help="dollars per GPU and hour")
    add(
        "--efficiency",
        type=float,
        default=0.6,
        help="share of the roofline that the run reaches",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the step's memory")
    add("--json", type=Path, metavar="FILE", help="write the plan")
    return parser


def find_config(name):
    """The LlamaConfig of a name in LLAMA3, or of a folder."""
    if name in LLAMA3:
        return LLAMA3[name]
    folder = Path(name)
    known = ", ".join(LLAMA3)
    require(
        folder.is_dir(),
        f"--model {name}: neither a folder nor one of {known}",
    )
    refuse_run(folder)
    file = folder / "config.json"
    require(file.is_file(), f"--model {name}: the folder has no config.json")
    return LlamaConfig.from_hf(read_json(file))


MOST = {
    "gpus": 2**15,  # a plan of so many takes two minutes
    "tensor_parallel": 2**10,
    "sequence_length": 2**24,
    "micro_batch_size": 2**16,
    "tokens": 1e18,
}


def check(args):
    """Refuse what cannot be planned, before the work."""
    for name, most in MOST.items():
        number = getattr(args, name)
        flag = "--" + name.replace("_", "-")
        require(1 <= number <= most, f"{flag} {number}: take 1 to {most:,.0f}")
    price = args.price
    require(0 <= price < 1e6, f"--price {price}: take 0 to 1,000,000")
    share = args.efficiency
    require(0 < share <= 1, f"--efficiency {share} must be above 0, at most 1")
    for name in ("plot", "json"):
        out = getattr(args, name)
        if out is not None:
            require(
                out.absolute().parent.is_dir() and not out.is_dir(),
                f"--{name} {out}: no such place for a file",
            )
    if args.plot is not None:
        kinds = (".png", ".svg", ".pdf")
        require(
            args.plot.suffix in kinds,
            f"--plot {args.plot} must end in {', '.join(kinds)}",
        )


def by_formula(config, setup):
    """Bytes of a rank by the formula that `make train` prints."""
    with without_memory():
        model = LlamaForCausalLM(config)
    parts = memory.plan(
        setup,
        model,
        torch.device("cuda"),
        torch.bfloat16,
        shards=setup.gpus // setup.tensor_parallel,
        tensor_parallel=setup.tensor_parallel,
        recompute=setup.recompute,
    )
    return sum(parts.values())


def report(args, config, made, gpu, formula):
    """The plan in words."""
    peak, limit = made["peak_bytes"], gpu.memory
    verdict = "fits" if peak <= limit else "does NOT fit"
    steps, seconds = made["seconds"]["step"], Counter(made["seconds"])
    print(
        f"{args.model}: {parameter_count(config):,} parameters on {args.gpus} "
        f"{args.gpu}, {args.tensor_parallel} for each "
        f"{args.micro_batch_size} x {args.sequence_length:,} tokens"
    )
    print(
        f"memory: {in_bytes(peak)} of {in_bytes(limit)} at the peak of a "
        f"rank: {verdict}; {in_bytes(formula)} by the formula of make train"
    )
    for name, size in made["memory"].items():
        if size >= 0.0005 * peak:
            print(f"    {name:12} {in_bytes(size):>10} {size / peak:6.1%}")
    print(f"work: {made['flops']:.3g} FLOPs of a rank and step")
    for name, size in made["wire_bytes"].items():
        print(f"wire: {in_bytes(size)} of a rank and step, {name}")
    print(
        f"time: {steps:.3g} s per step by the roofline, limited by {made['limit']}"
    )
    for name, part in seconds.most_common():
        if name != "step":
            print(f"    {name:16} {part:8.3g} s")
    speed = made["tokens_per_second"]
    expected = args.efficiency * speed
    days = args.tokens / expected / 86_400
    print(
        f"speed: {speed:,.0f} tokens/s at the roofline (MFU "
        f"{made['mfu']:.1%}), {expected:,.0f} expected at "
        f"{args.efficiency:g} of it, {expected / args.gpus:,.0f} a GPU"
    )
    print(
        f"run: {args.tokens:.3g} tokens in {short(days)} days, "
        f"${days * 24 * args.gpus * args.price:,.0f} at ${args.price:g} a GPU "
        "and hour"
    )


def plot(args, made, gpu):
    """Draw the memory of the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use("llama_tut.book")
    fig, ax = plt.subplots()
    draw_timeline(ax, made["timeline"], made["turn"])
    if gpu.memory < 1.2 * made["peak_bytes"]:
        ax.axhline(gpu.memory / 1e9, color="0.3", ls="--", lw=1)
    ax.set_title(f"{args.model} on {args.gpus} {args.gpu}")
    fig.savefig(args.plot)
    print(f"drawn: {args.plot}")


def main():
    args = build_parser().parse_args()
    check(args)
    config, gpu = find_config(args.model), GPUS[args.gpu]
    setup = Setup(
        gpus=args.gpus,
        tensor_parallel=args.tensor_parallel,
        sequence_length=args.sequence_length,
        micro_batch_size=args.micro_batch_size,
        recompute=args.recompute,
        plain=args.plain,
    )
    made = make_plan(config, setup, gpu)
    report(args, config, made, gpu, by_formula(config, setup))
    out = args.json
    try:
        if out is not None:
            write_json(out, {"setup": vars(setup), **made})
        out = args.plot
        if out is not None:
            plot(args, made, gpu)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror}"
        ) from error


if __name__ == "__main__":
    run(main)
