"""One step, the loop, validation."""

import pytest
import torch
from training_setup import OPTIONS, tiny_data

from llama_tut.loader import ShardLoader
from llama_tut.optimizer import build_optimizer
from llama_tut.pretraining import build_llama
from llama_tut.tools.options import (
    configure,
)
from llama_tut.tools.prepare import load_dataset_info
from llama_tut.tools.ranks import Ranks
from llama_tut.trainer import evaluate, train_step

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(data, tmp_path):
    return configure(
        {"data": str(data), "out": str(tmp_path / "run"), **OPTIONS}
    )


def test_micro_batches_and_their_number_do_not_matter(config, data):
    info = load_dataset_info(data)

    def step(B):
        torch.manual_seed(0)
        model = build_llama(config, info)
        optimizer = build_optimizer(model, "adamw", 1e-2)
        loader = ShardLoader(data, "train", B, 32)
        batches = [loader.next_batch() for _ in range(16 // B)]
        loss, norm = train_step(model, optimizer, batches)
        return loss, norm, *model.parameters()

    whole = step(16)
    for B in (1, 4, 8):
        torch.testing.assert_close(step(B), whole, rtol=1e-4, atol=1e-5)


def test_validation_depends_neither_on_batch_nor_on_ranks(config, data):
    model = build_llama(config, load_dataset_info(data))
    loader = ShardLoader(data, "val", 1, 32, shuffle=False)
    rows = min(7, len(loader))
    expected = []
    for _ in range(rows):
        inputs, targets = loader.next_batch()
        with torch.no_grad():
            logits = model(inputs)
        expected.append(
            torch.nn.functional.cross_entropy(logits[0], targets[0])
        )
    expected = torch.stack(expected).mean().item()
    for B in (1, 2, 3, rows):
        loader.batch_size = B
        found = evaluate(model, loader, rows)
        assert found == pytest.approx(expected, abs=1e-5)
    for W, loader.batch_size in ((2, 2), (3, 2), (4, 1), (8, 3)):
        sums = []  # of each rank: losses, tokens
        for rank in range(W):
            evaluate(
                model, loader, rows, rank=rank, world_size=W,
                mean=lambda own, sums=sums: sums.append(own) or own,
            )  # fmt: skip
        losses, tokens = torch.stack(sums).sum(0).tolist()
        assert tokens == rows * 32
        assert losses / tokens == pytest.approx(expected, abs=1e-5)
    assert model.training
