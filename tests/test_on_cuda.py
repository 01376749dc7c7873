"""What only a GPU can show: the same functions there as on the CPU (pytest -k cuda)."""

from functools import partial

import pytest
import torch

from llama_tut.config import LlamaConfig
from llama_tut.fast.generation import FastModel, RecordedReader
from llama_tut.fast.scoring import score_packed
from llama_tut.fast.training import head_loss, speed_up
from llama_tut.generate import generate, stream_guessing
from llama_tut.hellaswag import score_rows
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer
from llama_tut.trainer import train_step

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"
)


@pytest.fixture
def pair():
    """The same small model on the CPU and on the GPU, float32."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    here, there = LlamaForCausalLM(config), LlamaForCausalLM(config)
    there.load_state_dict(here.state_dict())
    return here.eval(), there.cuda().eval()


def random_ids(*shape):
    return torch.randint(
        512, shape, generator=torch.Generator().manual_seed(1)
    )


def test_logits_on_cuda_are_those_of_the_cpu(pair):
    here, there = pair
    ids = random_ids(3, 100)
    with torch.no_grad():
        found, wanted = there(ids.cuda()).cpu(), here(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_gradients_on_cuda_are_those_of_the_cpu(pair):
    here, there = pair
    ids = random_ids(3, 65)
    here(ids[:, :-1], targets=ids[:, 1:]).backward()
    ids = ids.cuda()
    there(ids[:, :-1], targets=ids[:, 1:]).backward()
    for (name, a), b in zip(
        here.named_parameters(), there.parameters(), strict=True
    ):
        torch.testing.assert_close(
            b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-4, msg=name
        )


def test_text_on_cuda_is_that_of_the_cpu(pair):
    here, there = pair
    ids = random_ids(1, 20)
    found = generate(there, ids.cuda(), max_new_tokens=30).cpu()
    assert torch.equal(found, generate(here, ids, max_new_tokens=30))


def test_recorded_steps_on_cuda_write_the_same_text(pair):
    """With guesses that hold and others that do not, in steps of several lengths."""
    _, model = pair
    ids = random_ids(1, 20).cuda()
    fast, backwards = FastModel(model), FastModel(model)
    backwards.layers = backwards.layers[::-1]
    for draft in (None, fast, backwards):
        found = stream_guessing(
            fast, ids, 30, make_reader=partial(RecordedReader, draft=draft)
        )
        found = torch.cat([ids[0], *found])
        assert torch.equal(found, generate(model, ids, max_new_tokens=30)[0])


def test_packed_scores_on_cuda_are_those_of_rows(pair):
    _, there = pair
    items = [
        (
            random_ids(n).tolist(),
            [random_ids(m).tolist() for m in (5, 8, 3, 9)],
        )
        for n in (40, 17, 60)
    ]
    found, wanted = score_packed(there, items), score_rows(there, items)
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(wanted), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("tiles", [False, True])
def test_training_on_cuda_lowers_the_loss(pair, tiles):
    _, model = pair
    speed_up(model, "cuda", torch.bfloat16)
    if tiles:
        model.compute_loss = head_loss
    ids = random_ids(4, 65)
    optimizer = build_optimizer(model, learning_rate=3e-3)
    losses = [
        train_step(
            model,
            optimizer,
            [(ids[:, :-1], ids[:, 1:])],
            autocast=lambda: torch.autocast("cuda", torch.bfloat16),
        )[0]
        for _ in range(20)
    ]
    assert losses[-1] < losses[0] - 1


def test_ddp_with_one_rank_on_cuda_has_the_gradients_of_one_process(pair):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    _, model = pair
    ids = random_ids(4, 65).cuda()
    model(ids[:, :-1], targets=ids[:, 1:]).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    dist.init_process_group(
        "nccl", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        parallel = DistributedDataParallel(model, device_ids=[0])
        parallel(ids[:, :-1], targets=ids[:, 1:]).backward()
        for a, p in zip(wanted, model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, a)
    finally:
        dist.destroy_process_group()
