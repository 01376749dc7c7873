"""Mixtures of experts: against transformers, against themselves, in the trainer."""

import copy
import json
import os
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from small_model import caller
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training_setup import OPTIONS
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    MixtralConfig,
)
from transformers.models.mixtral.modeling_mixtral import (
    load_balancing_loss_func,
)

from llama_tut import pretraining
from llama_tut.config import LlamaConfig
from llama_tut.mlp import LlamaMLP
from llama_tut.model import LlamaForCausalLM
from llama_tut.moe import (
    Experts,
    MoE,
    MoEConfig,
    MoEForCausalLM,
    Router,
    SortedExperts,
    balance_experts,
    balance_term,
    build_moe,
    moe_layers,
    route_deepseek,
    route_mixtral,
    spread_experts,
    swap_mlps,
)
from llama_tut.optimizer import build_optimizer, parameter_groups
from llama_tut.parallel import ParallelLayout, ParallelOptions
from llama_tut.tools.files import InputError
from llama_tut.tools.moe_config import MoeOptions
from llama_tut.tools.on_ranks import on_ranks
from llama_tut.tools.options import configure
from llama_tut.tools.ranks import start, stop
from llama_tut.tools.runs import read_metrics
from llama_tut.weights import load_pretrained, save_pretrained

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MIXTRAL = MoEConfig(**SHAPE, mlp="mixtral")
DEEPSEEK = MoEConfig(
    **SHAPE,
    mlp="deepseek",
    experts=32,
    experts_per_token=7,
    shared_experts=1,
    expert_groups=4,
    open_groups=2,
    routed_scale=2.5,
)
HF = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FINE = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}


def batch(rows=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (rows, 33), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def random_folder(config, folder):
    """A folder of transformers with random weights, routers not at zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers[1:]:
        for tensor in layer.mlp.gate.state_dict().values():
            tensor.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**HF, sliding_window=None),
        Glm4MoeConfig(**HF, **FINE, partial_rotary_factor=1.0, head_dim=16),
    ],
    ids=["mixtral", "glm4"],
)
def test_logits_equal_transformers_there_and_back(config, tmp_path):
    theirs = random_folder(config, tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs").eval()
    inputs, _ = batch()
    with torch.no_grad():
        wanted = theirs(inputs).logits
        torch.testing.assert_close(ours(inputs), wanted)
        save_pretrained(ours, tmp_path / "ours")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(back(inputs).logits, wanted)
    again = load_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert again.config == ours.config
    assert again.output_weight.dtype == torch.bfloat16
    for name, bias in again.named_buffers():
        if name.endswith("bias"):
            assert bias.dtype == torch.float32, "a nudge of 0.001 must count"


def test_a_deepseek_v3_is_refused_by_name(tmp_path):
    """Chapter 26 reads its expert layers, and compares them."""
    config = DeepseekV3Config(**HF, **FINE)
    (tmp_path / "config.json").write_text(config.to_json_string())
    with pytest.raises(InputError, match="multi-head latent attention"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("config", [MIXTRAL, DEEPSEEK], ids=lambda c: c.mlp)
def test_sorted_rows_equal_the_loop(config):
    torch.manual_seed(0)
    router, experts = Router(config), SortedExperts(config)
    router.init_weights(0.5)
    experts.init_weights(0.2, 0.2)
    x = torch.randn(40, 64, requires_grad=True)
    _, chosen, weights = router(x)
    found = []
    for way in (Experts.forward, SortedExperts.forward):
        y = way(experts, x, chosen, weights)
        wanted = [x, router.weight, *experts.parameters()]
        loss = y.square().sum()
        found.append(
            [y, *torch.autograd.grad(loss, wanted, retain_graph=True)]
        )
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_widths_that_grouped_products_refuse():
    """In bfloat16 a row of 44 numbers is no multiple of 16 bytes."""
    config = MoEConfig(
        **SHAPE | {"intermediate_size": 88}, mlp="mixtral", experts=4
    )
    experts = SortedExperts(config).bfloat16()
    experts.init_weights(0.2, 0.2)
    x = torch.randn(20, 64).bfloat16()
    chosen = torch.rand(20, 4).topk(2).indices
    weights = torch.full((20, 2), 0.5).bfloat16()
    one = experts(x, chosen, weights)
    two = Experts.forward(experts, x, chosen, weights)
    torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)


def test_equal_experts_are_one_dense_mlp():
    dense = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=128))
    layer = MoE(MIXTRAL)
    layer.init_weights(0.3, 0.3)
    with torch.no_grad():
        for stack, matrix in zip(
            layer.experts.parameters(), dense.parameters(), strict=True
        ):
            stack.copy_(matrix.expand_as(stack))
        x = torch.randn(2, 9, 64)
        torch.testing.assert_close(layer(x), dense(x))


def test_the_bias_chooses_and_is_not_in_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.4])
    scores, chosen, weights = route_deepseek(logits, bias, 2)
    assert chosen.tolist() == [[2, 0]]
    both = scores[0, [2, 0]]
    torch.testing.assert_close(weights[0], both / both.sum())


def test_balancing_term_by_layer_and_its_scale():
    logits = torch.randn(500, 8)
    ours = balance_term(*route_mixtral(logits, 2)[:2])
    theirs = load_balancing_loss_func((logits,), 8, 2)
    torch.testing.assert_close(2 * ours, theirs)
    even = torch.full((40, 8), 1 / 8)
    by_turns = torch.arange(80).view(40, 2) % 8
    assert balance_term(even, by_turns).item() == pytest.approx(1)


def test_the_loss_is_the_cross_entropy_and_its_gradient_has_the_term():
    inputs, targets = batch()
    gradients = {}
    for balance in (0.0, 1.0):
        torch.manual_seed(0)
        model = MoEForCausalLM(
            MoEConfig(**SHAPE, mlp="mixtral", balance=balance)
        )
        loss = model(inputs, targets=targets)
        logits = model(inputs).flatten(0, 1)
        assert loss == F.cross_entropy(logits, targets.flatten())
        loss.backward()
        gate = model.model.layers[0].mlp.gate.weight
        gradients[balance] = gate.grad.clone()
        model.zero_grad()
    term = sum(balance_term(*m.latest) for m in moe_layers(model).values())
    (gradient,) = torch.autograd.grad(term, gate)
    torch.testing.assert_close(
        gradients[1.0] - gradients[0.0], gradient, rtol=1e-4, atol=1e-6
    )


def test_right_under_accumulation():
    """Four equal micro batches: the gradient of one; four times its load."""
    inputs, targets = batch()
    found = []
    for k in (1, 4):
        torch.manual_seed(0)
        model = MoEForCausalLM(MoEConfig(**SHAPE, mlp="mixtral", balance=1.0))
        for _ in range(k):
            (model(inputs, targets=targets) / k).backward()
        found.append(model)
    for p, q in zip(*(m.parameters() for m in found), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for one, four in zip(
        *(moe_layers(m).values() for m in found), strict=True
    ):
        assert one.load.sum() == inputs.numel() * 2
        assert torch.equal(4 * one.load, four.load)


@pytest.mark.parametrize("config", [MIXTRAL, DEEPSEEK], ids=lambda c: c.mlp)
def test_right_under_activation_checkpointing(config):
    inputs, targets = batch()
    torch.manual_seed(0)
    plain = MoEForCausalLM(config)
    again = copy.deepcopy(plain)
    for layer in again.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for model in (plain, again):
        model(inputs, targets=targets).backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    loads = [[m.load for m in moe_layers(n).values()] for n in (plain, again)]
    assert all(map(torch.equal, *loads))


def test_validation_counts_nothing():
    model = MoEForCausalLM(MIXTRAL)
    inputs, targets = batch()
    with torch.no_grad():
        model.eval()(inputs, targets=targets)
    assert all(m.load.sum() == 0 for m in moe_layers(model).values())


def test_biases_are_nudged_against_the_load_and_saved():
    model = MoEForCausalLM(DEEPSEEK)
    inputs, targets = batch()
    model(inputs, targets=targets)
    mlp, line = model.model.layers[0].mlp, {}
    load = mlp.load.clone()
    balance_experts(model, line)
    bias = mlp.gate.e_score_correction_bias
    assert torch.equal(bias, 0.001 * torch.sign(load.mean() - load))
    assert mlp.load.sum() == 0
    assert line["load_max/0"] == pytest.approx(
        (load.max() / load.mean()).item()
    )
    assert {"load_min/0", "load_max/1", "load_min/1"} <= line.keys()
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.state_dict()[name], bias)
    assert "model.layers.0.mlp.load" not in model.state_dict()


def test_initialisation_with_depth_scaling_reaches_the_experts():
    model = MoEForCausalLM(DEEPSEEK)
    std = model.config.initializer_range
    for mlp in moe_layers(model).values():
        for module in (mlp.experts, mlp.shared_experts):
            stds = [p.std().item() for p in module.parameters()]
            wanted = [std, std, std / 2]  # 1 / sqrt(2 L), L = 2
            assert stds == pytest.approx(wanted, rel=0.1)


def test_a_finished_llama_is_swapped_from_outside():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
    before = model.model.layers[0].mlp
    config = MoEConfig(
        **SHAPE, mlp="deepseek", shared_experts=2, dense_layers=1
    )
    swap_mlps(model, config)
    assert model.model.layers[0].mlp is before
    assert isinstance(model.model.layers[1].mlp, MoE)
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


def test_stacks_decay_and_are_many_matrices_to_muon():
    model = MoEForCausalLM(MIXTRAL)
    (muon,) = (g for g in parameter_groups(model, 0.1, True) if g["muon"])
    names = {name.split(".", 3)[-1] for name, _ in muon["params"]}
    assert muon["weight_decay"] == 0.1
    assert {"mlp.experts.gate_proj", "mlp.gate.weight"} <= names
    # One step on a stack is one step on each of its matrices.
    torch.manual_seed(0)
    gradient = torch.randn(3, 8, 6)
    stack = torch.nn.ParameterDict({"0": torch.zeros(3, 8, 6)})
    alone = torch.nn.ParameterList([torch.zeros(8, 6) for _ in range(3)])
    stack["0"].grad = gradient
    for p, g in zip(alone, gradient, strict=True):
        p.grad = g.clone()
    for module in (stack, alone):
        build_optimizer(module, "muon", 0.1).step()
    torch.testing.assert_close(stack["0"].data, torch.stack([*alone]).data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4, "experts_per_token": 5}, "more than --experts 4"),
        ({"experts": 9, "expert_groups": 2}, "--experts 9 is not a multiple"),
        ({"expert_groups": 2, "open_groups": 3}, "there are only 2 groups"),
        ({"experts_per_token": 3}, "not a multiple of the 3 experts"),
        ({"expert_size": 0}, "--expert-size must be"),
        (
            {"shared_experts": -1},
            "--shared-experts must be a number, at least 0, not -1",
        ),
        (
            {"expert_groups": 4, "experts_per_token": 4},
            "open groups have only 2",
        ),
        ({"mlp": "mixtral", "shared_experts": 1}, "not part of Mixtral"),
        ({"mlp": "dense"}, "has no experts"),
    ],
)
def test_numbers_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        MoEConfig(**SHAPE, **{"mlp": "deepseek", **options})


def test_options_without_a_mixture():
    with pytest.raises(InputError, match="--experts needs --mlp"):
        MoeOptions(experts=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 4}, "mlp.gate.weight is"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"model_type": "llama"}, "block_sparse_moe|mlp"),
    ],
)
def test_a_folder_of_another_router(change, message, tmp_path):
    random_folder(MixtralConfig(**HF, sliding_window=None), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_pretrained(tmp_path)


# Plain, because `run` below swaps nothing in.
RUN = OPTIONS | {
    "plain": True,
    "mlp": "deepseek",
    "experts": 8,
    "experts_per_token": 2,
    "shared_experts": 1,
    "balance": 0.01,
    "steps": 4,
    "checkpoint_every": 2,
    "samples": 0,
}
COARSE = {"mlp": "mixtral", "shared_experts": 0}


def run(options):
    """Train experts as scripts/train.py does -> the lines of metrics.jsonl."""
    config = configure(options, [ParallelOptions, MoeOptions])
    pretraining.train(
        config,
        build_moe,
        after_step=balance_experts,
        build_layout=ParallelLayout,
    )
    return read_metrics(f"{config.out}/metrics.jsonl")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder of runs of this process: "deepseek" and "mixtral"."""
    out = tmp_path_factory.mktemp("experts")
    common = RUN | {"data": str(data)}
    run(common | {"out": str(out / "deepseek")})
    run(common | COARSE | {"out": str(out / "mixtral")})
    return out


@pytest.fixture(scope="module")
def pair(runs, data):
    """What two ranks found: one job for all that needs them."""
    common = RUN | {"data": str(data)}
    sharded = {"parallel": "fsdp", "recompute": True}
    os.environ["EXPERT_RUNS"] = json.dumps(
        [
            common | COARSE | {"out": str(runs / "ddp")},
            common | sharded | {"out": str(runs / "fsdp")},
        ]
    )
    return on_ranks(2, two_ranks)


def two_ranks():
    """What one of the two does: spread experts, then the two runs."""
    ranks = start("cpu")
    pretraining.start = lambda device: ranks  # one group for all runs
    pretraining.stop = lambda: None
    found = [spread(name, config) for name, config in CASES.items()]
    for options in json.loads(os.environ["EXPERT_RUNS"]):
        run(options)
    stop()
    return found


CASES = {
    "mixtral": {"mlp": "mixtral", "experts": 4, "balance": 0.0},
    "deepseek": {"mlp": "deepseek", "shared_experts": 1, "expert_size": 48},
}


def spread(name, options):
    """Losses, rows by rank, and gradients: one process, and spread experts."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    whole = MoEForCausalLM(MoEConfig(64, 32, 96, 2, 2, **options))
    for bias in whole.model.layers[1].mlp.gate.buffers():
        bias[:4] = -9.0  # then no token chooses an expert of rank 0
    part = copy.deepcopy(whole)
    spread_experts(part)
    ids = torch.randint(64, (4, 17))
    found = {"rows": [], "loss": [], "worst": 0.0}
    for model, rows in ((whole, ids), (part, ids.chunk(2)[rank])):
        loss = model(rows[:, :-1], targets=rows[:, 1:])
        loss.backward()
        found["loss"].append(loss.item())
    for mlp in moe_layers(part).values():
        found["rows"].append(mlp.load.view(2, -1).sum(1).tolist())
    for name, p in part.named_parameters():
        q = whole.get_parameter(name).grad
        if ".experts." in name:
            q = q.chunk(2)[rank]
        else:
            dist.all_reduce(p.grad.div_(2))  # as DDP does
        error = (p.grad - q).abs().max() / (q.abs().max() + 1e-12)
        found["worst"] = max(found["worst"], error.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=list(CASES))
def test_spread_experts_are_those_of_one_process(pair, number):
    one, two = (rank[number] for rank in pair)
    assert one["loss"][0] == two["loss"][0]
    mean = (one["loss"][1] + two["loss"][1]) / 2
    assert mean == pytest.approx(one["loss"][0], rel=1e-6)
    assert max(one["worst"], two["worst"]) < 1e-4
    assert one["rows"][0] != two["rows"][0], "each rank sends its own"
    assert all(mine != theirs for mine, theirs in one["rows"]), "not halves"
    if number:  # all rows to rank 1, none to rank 0
        assert one["rows"][1] == two["rows"][1] == [0, 64]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "both"), [("mixtral", "ddp"), ("deepseek", "fsdp")]
)
def test_two_ranks_train_as_one(runs, pair, one, both):
    """Losses and loads; under FSDP with recomputation, the folder too."""
    lines = [
        read_metrics(runs / name / "metrics.jsonl") for name in (one, both)
    ]
    for mine, theirs in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "load_max/0", "load_min/1"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    mine, theirs = (
        load_pretrained(runs / name / "model").state_dict()
        for name in (one, both)
    )
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def test_resumes_exactly_and_transformers_reads_the_folder(
    runs, tmp_path, monkeypatch, capsys
):
    whole, cut = runs / "deepseek", tmp_path / "cut"
    lines = read_metrics(whole / "metrics.jsonl")
    assert all({"load_max/0", "load_min/1"} <= line.keys() for line in lines)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step_00000004")
    call = caller("train", monkeypatch, capsys, "--out", cut, "--resume")
    code, out, _ = call()
    assert code == 0 and "resumed at step 2" in out
    again = read_metrics(cut / "metrics.jsonl")
    assert [x["loss"] for x in again] == [x["loss"] for x in lines]
    ours, first = (load_pretrained(f / "model") for f in (cut, whole))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    bias = ours.model.layers[0].mlp.gate.e_score_correction_bias
    assert bias.abs().max() > 0, "the router's bias is in the checkpoint"
    theirs = AutoModelForCausalLM.from_pretrained(cut / "model")
    inputs, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs).logits, ours(inputs))
    code, _, err = call("--experts-per-token", 5)
    assert code == 2 and err.count("\n") == 1
    assert "--experts-per-token was 2, now it is 5; give the old" in err


def test_equal_runs_are_equal_in_every_bit_on_many_threads():
    """No two rows are added in one place by two threads."""
    torch.manual_seed(0)
    fine = {"experts": 32, "experts_per_token": 7, "shared_experts": 1}
    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    model = MoEForCausalLM(MoEConfig(**shape, mlp="deepseek", **fine))
    ids = torch.randint(256, (8, 129))

    def gradient():
        model.zero_grad()
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = gradient()
        assert all(gradient().equal(first) for _ in range(10))
    finally:
        torch.set_num_threads(before)
