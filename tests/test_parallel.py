"""One model on 1, 2 and 4 ranks, in every layout, against one process."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import functional_call
from torch.nn import functional as F

from llama_tut.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from llama_tut.config import LlamaConfig
from llama_tut.distributed import inner, wrap
from llama_tut.generate import generate
from llama_tut.gpt2 import LadderConfig, LadderForCausalLM
from llama_tut.model import LlamaForCausalLM, next_token_loss
from llama_tut.optimizer import build_optimizer
from llama_tut.parallel import (
    build_mesh,
    check_cut,
    clip_gradients,
    cut,
    gather_weights,
    recompute,
    shard,
    sync_gradients,
    vocabulary_loss,
    whole_model,
)
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.tools.files import InputError
from llama_tut.tools.on_ranks import on_ranks
from llama_tut.tools.parallel_config import ParallelOptions, check_layout
from llama_tut.tools.ranks import mean_over_ranks, on_rank_zero, start

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "24_parallel.ipynb"


def cells_of(*starts):
    """The source of the chapter's cells that hold one of these beginnings."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    found = [
        c.source
        for c in cells
        if any(line.startswith(starts) for line in c.source.splitlines())
    ]
    return "\n\n".join(found)


HAND = (
    "import torch, torch.distributed as dist\n"
    "from torch import nn\nfrom functools import partial\n"
) + cells_of(
    "def padded(", "def gather(", "class Gather(", "def run_whole(",
    "def shard_by_hand(",
)  # fmt: skip


MORE = (
    "from llama_tut.parallel import *\nfrom torch import nn\n"
    "from torch.distributed.tensor import Shard\n"
    "from torch.distributed.tensor.parallel import SequenceParallel\n"
    "from llama_tut.config import LlamaConfig\n"
    "from llama_tut.model import LlamaForCausalLM\n"
) + cells_of(
    "def small(", "def worst_gradient(", "def cut_with_sequence(",
    "class GatherKeys(", "def context(", "def pipeline(",
).replace('dist.init_process_group("gloo")', "")  # fmt: skip


def small(layers=2, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"num_hidden_layers": layers} | options
    return LlamaForCausalLM(LlamaConfig(**sizes))


def rows_of(number, part=0, parts=1, last=96):
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(last, (8, 17), generator=generator).chunk(parts)[part]
    return rows[:, :-1], rows[:, 1:]


def train(model, part=0, parts=1):
    """Losses and norms of three steps of two micro batches."""
    optimizer = build_optimizer(inner(model), learning_rate=1e-4)
    found = []
    for step in range(3):
        total = torch.zeros(())
        for micro in range(2):
            inputs, targets = rows_of(2 * step + micro, part, parts)
            with sync_gradients(model, last=micro == 1):
                loss = model(inputs, targets=targets) / 2
                loss.backward()
            total += loss.detach()
        norm = clip_gradients(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append([mean_over_ranks(total).item(), norm.item()])
    return found


def differences(steps, weights, alone):
    """Largest errors of losses and norms, and of weights by name.

    All ranks call it; `weights` are empty on all but rank 0.
    """
    wanted = torch.tensor(train(alone))
    error = (torch.tensor(steps) / wanted - 1).abs().max().item()
    state = alone.state_dict()
    assert list(weights) == (list(state) if dist.get_rank() == 0 else [])
    return error, [
        (w - state[k]).abs().max().item() for k, w in weights.items()
    ]


# (name, tensor parallel, options of the model)
ODD = {"vocab_size": 97}  # two ranks get 49 and 48 words
TIED = {"tie_word_embeddings": True}
LAYOUTS = {
    1: [("fsdp", 1, {}), ("tp", 1, {})],
    2: [
        ("ddp", 1, {}),
        ("fsdp", 1, {}),
        ("fsdp", 1, TIED),
        ("fsdp recompute", 1, ODD),
        ("tp", 2, {}),
        ("tp", 2, TIED),
        ("tp recompute", 2, {"num_key_value_heads": 2} | ODD),
    ],
    4: [
        ("ddp", 1, {}),
        ("fsdp", 1, {}),
        ("tp", 4, {}),
        ("fsdp tp", 2, {}),
        ("fsdp tp recompute", 2, TIED),
    ],
}


def every_layout(ranks=None):
    ranks = ranks or start("cpu")
    if ranks.world_size == 1:
        dist.init_process_group("gloo")
    found = []
    for name, tp, options in LAYOUTS[ranks.world_size]:
        mesh = build_mesh("cpu", ranks.world_size, tp)
        model, dp = small(**options), mesh["dp"]
        if "recompute" in name:
            recompute(model)
        if "tp" in name:
            cut(model, mesh["tp"])
        if "fsdp" in name:
            shard(model, dp)
        if name == "ddp":
            model = wrap(model, ranks)
        steps = train(model, dp.get_local_rank(), dp.size())
        weights = gather_weights(inner(model))
        here = [getattr(p, "_local_tensor", p) for p in model.parameters()]
        numbers = sum(p.numel() for p in here)
        errors = differences(steps, weights, small(**options))
        found.append([name, tp, options, numbers, *errors])
    return found


def laid_out(tp, ranks):
    """A small model on ranks of FSDP and of `tp`, its optimizer, its mesh."""
    mesh = build_mesh("cpu", ranks.world_size, tp)
    model = small()
    if tp > 1:
        cut(model, mesh["tp"])
    shard(model, mesh["dp"])
    return model, build_optimizer(model, learning_rate=1e-2), mesh["dp"]


def go_on(model, optimizer, dp, first, last):
    """Losses of the steps from `first` to `last`, each of its own rows."""
    losses = []
    for step in range(first, last):
        inputs, targets = rows_of(step, dp.get_local_rank(), dp.size())
        loss = model(inputs, targets=targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.detach()).item())
    return losses


def take_copies(folder, out):
    """A list; while it holds True, copies of `folder` go to `out`, one before
    each change that this rank makes to files: what kill -9 would leave."""
    on, changes = [], ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def hook(event, args):
        if on and (
            event in changes
            or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        ):
            on.clear()  # copying changes files, too
            number = len(list(out.glob(f"{dist.get_rank()}-*")))
            name = f"{dist.get_rank()}-{number:03}"
            shutil.copytree(folder, out / name, dirs_exist_ok=True)
            on.append(True)

    sys.addaudithook(hook)
    return on


def visible(copy):
    """Names and sizes of all files of a copy that count as checkpoints."""
    files = sorted(copy.glob("step_*/*"))
    return [(f.parent.name, f.name, f.stat().st_size) for f in files]


def saves_that_are_killed(ranks, tp):
    """How many moments a save has; which step was found after each kill,
    and whether the losses from there are those of the unbroken run."""
    base = Path(sys.argv[1]).parent / f"killed-{tp}"
    folder, out = base / "checkpoints", base / "copies"
    model, optimizer, dp = laid_out(tp, ranks)
    losses = go_on(model, optimizer, dp, 0, 2)
    save = partial(save_checkpoint, folder, state={}, keep=1, ranks=ranks)
    save(2, model, optimizer)
    losses += go_on(model, optimizer, dp, 2, 3)
    out.mkdir(exist_ok=True)
    dist.barrier()
    on = take_copies(folder, out)
    on.append(True)
    save(3, model, optimizer)
    on.clear()
    losses += go_on(model, optimizer, dp, 3, 5)
    copies = on_rank_zero(ranks, lambda: sorted(map(str, out.iterdir())))
    kinds = {str(visible(Path(copy))): copy for copy in reversed(copies)}
    found = []
    for copy in kinds.values():
        path = on_rank_zero(ranks, latest_checkpoint, copy, lambda line: None)
        torch.manual_seed(1)
        again, fresh, dp = laid_out(tp, ranks)
        go_on(again, fresh, dp, 7, 8)  # a past that must not show
        step = load_checkpoint(path, again, fresh, ranks)["step"]
        found.append((step, go_on(again, fresh, dp, step, 5) == losses[step:]))
    return len(copies), found


def on_four_ranks():
    ranks = start("cpu")
    layouts = every_layout(ranks)
    return layouts, [saves_that_are_killed(ranks, tp) for tp in (1, 2)]


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, on_four_ranks)


@pytest.mark.slow
def test_a_save_killed_at_any_moment_leaves_the_newest_valid_one(four):
    """Under FSDP, and FSDP x TP: resumed bit for bit on the same layout."""
    for _, kills in four:
        for moments, found in kills:
            assert moments > 12 and {step for step, _ in found} == {2, 3}
            assert all(same for _, same in found)


@pytest.mark.parametrize("W", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_is_one_process(W, request):
    if W == 4:
        zero = request.getfixturevalue("four")[0][0]
    else:
        zero = on_ranks(W, every_layout)[0]
    for name, tp, options, numbers, error, worst in zero:
        assert error < 1e-5 and max(worst) < 1e-5, (name, options)
        shapes = [p.shape for p in small(**options).parameters()]
        if name == "ddp":
            expected = sum(shape.numel() for shape in shapes)
        else:  # rank 0 of pieces that are cut by rows, and norms by FSDP only
            expected = 0
            dp = W // tp
            for shape in shapes:
                ways = W if len(shape) == 2 else dp
                rows = -(-shape[0] // ways) if shape[0] % ways else None
                expected += (
                    shape.numel() // ways
                    if rows is None
                    else rows * shape[1:].numel()
                )
        assert numbers == expected, (name, options)


class Toy(nn.Module):
    """Parts as in the test of FSDP of Stanford's CS336, assignment 2."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(101, 64)  # 101: no multiple of 2
        self.norm1 = LlamaRMSNorm(64)
        self.linear1 = nn.Linear(64, 128, bias=False)
        self.norm2 = LlamaRMSNorm(128)
        self.linear2 = nn.Linear(128, 64, bias=False)
        self.lm_head = nn.Linear(64, 101, bias=False)

    def forward(self, x):
        x = self.linear1(self.norm1(self.embedding(x))).relu()
        return self.lm_head(self.linear2(self.norm2(x)))


def by_hand():
    """What that test asks: steps, gradients' shapes and dtypes, gathering."""
    dist.init_process_group("gloo")
    rank, hand, found = dist.get_rank(), {}, {}
    exec(HAND, hand)
    for dtype in (None, torch.float16):
        torch.manual_seed(42)
        alone = Toy()
        model = Toy()
        model.load_state_dict(alone.state_dict())
        units = [model.linear1, model.linear2, model]
        hand["shard_by_hand"](units, dtype)
        names = [n for n, _ in model.named_parameters()]
        assert names == [n for n, _ in alone.named_parameters()]
        pair = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, alone)]
        ids, labels = torch.randint(101, (20, 8)), torch.randint(101, (20,))
        for step in range(3):
            for optimizer in pair:
                optimizer.zero_grad()
            logits = model(ids.chunk(2)[rank])[:, -1].float()
            F.cross_entropy(logits, labels.chunk(2)[rank]).backward()
            weights = {
                n: p.to(dtype or p.dtype) for n, p in alone.named_parameters()
            }
            logits = functional_call(alone, weights, ids)[:, -1].float()
            F.cross_entropy(logits, labels).backward()
            for p, q in zip(
                model.parameters(), alone.parameters(), strict=True
            ):
                assert p.grad.shape == p.shape and p.grad.dtype == p.dtype
                assert p.dtype == torch.float32
                assert len(p) == -(-len(q) // 2)
            for optimizer in pair:
                optimizer.step()
            for p, q in zip(
                model.parameters(), alone.parameters(), strict=True
            ):
                whole = hand["gather"](p, p.height)
                atol = 1e-6 if dtype is None else 1e-4
                torch.testing.assert_close(whole, q, atol=atol, rtol=1e-4)
            order = torch.randperm(
                20, generator=torch.Generator().manual_seed(step)
            )
            ids, labels = ids[order], labels[order]
        found[str(dtype)] = sum(p.numel() for p in model.parameters())
    return found


def freed():
    """A gathered weight is gone after forward, and gathered for backward."""
    hand, gathers = {}, []
    exec(HAND, hand)
    model = small()
    hand["shard_by_hand"]([*model.model.layers, model])
    inputs, targets = rows_of(0)
    whole = dist.all_gather_into_tensor

    def counted(*args):
        gathers.append(1)
        return whole(*args)

    dist.all_gather_into_tensor = counted
    loss = model(inputs, targets=targets)
    forward = len(gathers)
    loss.backward()
    dist.all_gather_into_tensor = whole
    held = {id(p): p.numel() for p in model.parameters()}
    return forward, len(gathers) - forward, sum(held.values())


def count(function):
    with CommDebugMode() as mode:
        function()
    found = {"allgather": 0, "reducescatter": 0, "allreduce": 0}
    for operation, n in mode.get_comm_counts().items():
        for kind in found:
            found[kind] += n * (kind in str(operation).replace("_", ""))
    return list(found.values())


def counts():
    """{(kind, L): gathers, reduce-scatters, all-reduces}."""
    rank, found = dist.get_rank(), {}
    fsdp = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    tp = build_mesh("cpu", 2, tensor_parallel=2)["tp"]
    for L in (2, 4):
        for freed in (True, False):
            model = shard(small(L), fsdp, reshard_after_forward=freed)
            inputs, targets = rows_of(0, rank, 2)
            for last in (False, True):
                with sync_gradients(model, last):
                    found["fsdp", freed, last, L] = count(
                        lambda m=model, x=inputs, y=targets: m(
                            x, targets=y
                        ).backward()
                    )
        model, kept = cut(small(L), tp), []
        inputs, targets = rows_of(0)
        found["tp", "forward", L] = count(
            lambda m=model, k=kept, x=inputs, y=targets: k.append(
                m(x, targets=y)
            )
        )
        found["tp", "backward", L] = count(lambda k=kept: k[0].backward())
    return found


def loss_of_cut_words():
    """Loss and both gradients, whole and cut, with targets that are -100."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    for V in (96, 97):
        torch.manual_seed(V)
        hidden, weight = torch.randn(4, 8, 32), 9 * torch.randn(V, 32)
        targets = torch.randint(-20, V, (4, 8))
        targets[targets < 0] = -100
        pair = []
        for is_cut in (False, True):
            h, w = hidden.clone().requires_grad_(), weight
            if is_cut:
                w = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
                loss = vocabulary_loss(h, w, targets, mesh)
            else:
                w = w.clone().requires_grad_()
                loss = next_token_loss(h, w, targets)
            (3 * loss).backward()
            g = w.grad.full_tensor() if is_cut else w.grad
            pair.append((loss.detach(), h.grad, g))
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        found.append(pair[0][0].item())
    return found


def other_uses():
    """Logits and text of a cut model, pieces, bfloat16, and a whole copy."""
    rank = dist.get_rank()
    tp = build_mesh("cpu", 2, tensor_parallel=2)["tp"]
    dp = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    alone, ids = small(), rows_of(0)[0]
    model = cut(small(), tp)
    torch.testing.assert_close(model(ids), alone(ids), atol=1e-5, rtol=1e-4)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with pytest.raises(InputError, match="whole_model"):
        generate(model, ids[:1], max_new_tokens=1)
    model = shard(small(), dp)
    with pytest.raises(InputError, match="whole_model"):
        generate(model, ids[:1], max_new_tokens=1)
    whole = whole_model(model, partial(small, initializer_range=1.0))
    assert (whole is model) == (rank == 1)
    if rank == 0:
        assert torch.equal(whole(ids), alone(ids))
    half = shard(small(), dp, torch.bfloat16)
    inputs, targets = rows_of(0)
    loss = half(inputs, targets=targets)
    loss.backward()
    assert loss == alone.bfloat16()(inputs, targets=targets)  # RoPE too
    for p in half.parameters():
        assert p.dtype == p.grad.dtype == torch.float32
    return "done"


def three_more_cuts():
    """Worst error of a gradient: as the chapter does it, and with a fault."""
    rank, found = dist.get_rank(), {}

    def space(old="", new=""):
        made = {}
        assert old in MORE
        exec(MORE.replace(old, new) if old else MORE, made)
        return made

    chapter = space()
    mesh, small = build_mesh("cpu", 2, 2)["tp"], chapter["small"]
    for kv in (4, 2):
        few = partial(small, num_key_value_heads=kv)
        model = chapter["cut_with_sequence"](few(), mesh)
        inputs, targets = chapter["rows_of"](0)
        where = torch.arange(32)
        model(inputs, position_ids=where, targets=targets).backward()
        found["sequence", kv] = chapter["worst_gradient"](model, few())
    gain = model.model.norm.weight.grad  # each rank has its tokens' term
    found["sequence", "broken"] = (
        (gain.to_local() - gain.full_tensor()).abs().max().item()
    )
    for name, fault in (
        ("right", ""),
        ("broken", "        dist.all_reduce(gradient)\n"),
    ):
        context = space(fault)["context"]
        for balanced in (True, False):
            found["context", balanced, name] = context(balanced)[1]
    alone, (inputs, targets) = small(layers=4), chapter["rows_of"](0)
    alone(inputs, targets=targets).backward()
    for name, fault in (("right", ""), ("broken", " / M")):
        gradients = space(fault)["pipeline"]()
        worst = 0.0
        for key, gradient in gradients.items():
            for i in (1, 0) if rank == 1 else ():
                key = key.replace(f"layers.{i}.", f"layers.{i + 2}.")
            error = gradient - alone.get_parameter(key).grad
            worst = max(worst, error.abs().max().item())
        found["pipeline", name] = worst
        found["pipeline", "gradients"] = len(gradients)
    return found


def on_two_ranks():
    found = {"hand": by_hand(), "freed": freed(), "counts": counts()}
    found["losses"], found["other"] = loss_of_cut_words(), other_uses()
    found["more"] = three_more_cuts()
    return found


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, on_two_ranks)


def test_fsdp_by_hand_does_what_a_course_asks(two):
    N = sum(p.numel() for p in Toy().parameters())
    padding = 64 + 64  # a row of the embedding, one of the head
    for found in two:
        expected = (N + padding) / 2
        assert found["hand"] == {"None": expected, "torch.float16": expected}


def test_by_hand_frees_and_gathers_again(two):
    N = sum(p.numel() for p in small().parameters())
    matrices_and_norms = 2 * 9 + 3
    for found in two:
        forward, backward, held = found["freed"]
        assert forward == matrices_and_norms and held == N / 2
        # ids, not weights, are what backward of an embedding needs
        assert backward == matrices_and_norms - 1


def test_messages_are_as_many_as_the_formula_says(two):
    for found in two:
        for key, (gathers, scatters, sums) in found["counts"].items():
            kind, L = key[0], key[-1]
            if kind == "fsdp":
                _, freed, last, _ = key
                assert gathers == (2 * L + 1 if freed else L + 1), key
                assert scatters == (L + 1) * last and sums == 0, key
            else:
                extra = 3 if key[1] == "forward" else 1
                assert [gathers, scatters, sums] == [0, 0, 2 * L + extra], key


def test_sequence_context_and_pipeline_are_one_process(two):
    """And the comparison sees a sum that is missing, or a mean."""
    counts = [found["more"].pop(("pipeline", "gradients")) for found in two]
    assert sum(counts) == len(list(small(layers=4).parameters()))
    for found in two:
        for name, worst in found["more"].items():
            assert (worst > 1e-4) if "broken" in name else (worst < 1e-6), name


def test_loss_over_a_cut_vocabulary(two):
    assert two[0]["losses"] == two[1]["losses"]


def test_other_uses_of_cut_and_sharded_models(two):
    assert [found["other"] for found in two] == ["done", "done"]


def test_recomputing_changes_no_bit_and_no_name():
    plain, spare = small(), recompute(small())
    inputs, targets = rows_of(0)
    losses = [model(inputs, targets=targets) for model in (plain, spare)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    pairs = zip(
        plain.named_parameters(), spare.named_parameters(), strict=True
    )
    for (name, p), (other, q) in pairs:
        assert name == other and torch.equal(p.grad, q.grad)
    with torch.no_grad():
        assert torch.equal(plain(inputs), spare(inputs))


@pytest.mark.parametrize(
    "sizes, W, words",
    [
        ({"num_key_value_heads": 2}, 4, "kv heads (2) must be divisible by 4"),
        (
            {
                "num_attention_heads": 9,
                "hidden_size": 36,
                "num_key_value_heads": 3,
            },
            2,
            "attention heads (9)",
        ),
        ({"intermediate_size": 81}, 2, "intermediate_size (81)"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(sizes, W, words):
    with pytest.raises(InputError) as refused:
        check_cut(small(**sizes), W)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_other_models_are_refused():
    with torch.device("meta"):
        other = LadderForCausalLM(LadderConfig())
    with pytest.raises(InputError, match="dense MLPs only"):
        check_cut(other, 2)


@pytest.mark.parametrize("tp", [0, 3, 8])
def test_a_mesh_that_does_not_multiply_is_refused(tp):
    with pytest.raises(InputError, match=f"{tp} does not divide the 4 ranks"):
        build_mesh("cpu", 4, tp)


def test_layouts_that_do_not_exist_are_refused():
    fsdp = ParallelOptions(parallel="fsdp", tensor_parallel=2)
    check_layout(fsdp, "adamw", 4)
    check_layout(ParallelOptions(tensor_parallel=4), "adamw", 4)
    with pytest.raises(InputError, match="leaves 2 groups: say --parallel"):
        check_layout(ParallelOptions(tensor_parallel=2), "adamw", 4)
    with pytest.raises(InputError, match="muon wants whole matrices"):
        check_layout(fsdp, "muon", 4)
    with pytest.raises(InputError, match="parallel"):
        ParallelOptions(parallel="zero")
