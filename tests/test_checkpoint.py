"""Checkpoints: exact, atomic, checked, and refused by name."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystem
from training_setup import SHAPE

from llama_tut import checkpoint
from llama_tut.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    random_states,
    save_checkpoint,
    verify_checkpoint,
)
from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer
from llama_tut.tools.files import InputError, fingerprint, write_json
from llama_tut.tools.ranks import Ranks

PART = "shard-00001-model-00001-of-00001.safetensors"  # of the one rank
TEXT = torch.randint(
    50, (40, 4, 9), generator=torch.Generator().manual_seed(0)
)


def new(optimizer="adamw", **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": 50, **SHAPE, **changes})
    )
    model.init_weights()
    return model, build_optimizer(model, optimizer, 1e-2)


def train(model, optimizer, first, last):
    losses = []
    for ids in TEXT[first:last]:
        loss = model(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_run_is_the_same_bit_for_bit(tmp_path, name, tied):
    model, optimizer = new(name, tie_word_embeddings=tied)
    train(model, optimizer, 0, 10)
    path = save_checkpoint(tmp_path, 10, model, optimizer, {"position": 40})
    unbroken = train(model, optimizer, 10, 20)
    model, optimizer = new(name, tie_word_embeddings=tied)
    train(model, optimizer, 30, 33)  # a past that must not show
    state = load_checkpoint(path, model, optimizer)
    assert state == {"step": 10, "position": 40}
    assert train(model, optimizer, 10, 20) == unbroken


def test_no_pickle_and_hugging_face_names(tmp_path):
    model, optimizer = new()
    train(model, optimizer, 0, 1)
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    assert {f.suffix for f in path.iterdir()} == {".safetensors", ".json"}
    stored = load_file(path / PART)
    assert {n for n in stored if "/" not in n} == model.state_dict().keys()
    assert optimizer_tensors(model, optimizer).keys() == {
        f"{name}/{key}"
        for name, _ in model.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_random_states_come_back_to_the_rank_that_had_them(tmp_path):
    model, optimizer = new()
    torch.manual_seed(2)
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_checkpoint(path, model)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_checkpoint(path, model, ranks=Ranks(rank=2))  # it had none: its own
    assert torch.equal(torch.rand(3), expected)


def test_what_earlier_versions_wrote_is_read(tmp_path):
    """Three safetensors files by rank 0, and format 1 in the manifest."""
    model, optimizer = new()
    train(model, optimizer, 0, 5)
    path = tmp_path / "step_00000005"
    path.mkdir()
    averages = optimizer_tensors(model, optimizer)
    save_file(model.state_dict(), path / "model.safetensors")
    save_file(averages, path / "optimizer.safetensors")
    torch.manual_seed(4)
    state = {"0/cpu": random_states()["cpu"]}
    save_file(state, path / "random.safetensors")
    write_json(path / "state.json", {"step": 5})
    files = {file.name: fingerprint(file) for file in path.iterdir()}
    manifest = {"format": 1, "step": 5, "files": files}
    write_json(path / "manifest.json", manifest)
    drawn, unbroken = torch.rand(2), train(model, optimizer, 5, 9)
    assert latest_checkpoint(tmp_path) == path
    model, optimizer = new()
    assert load_checkpoint(path, model, optimizer) == {"step": 5}
    assert torch.equal(torch.rand(2), drawn)
    assert train(model, optimizer, 5, 9) == unbroken
    (path / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors is missing" in verify_checkpoint(path)


def test_keeps_the_last_k_and_none_of_a_later_step(tmp_path):
    model, optimizer = new()
    for step in (1, 2, 3, 40):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    save_checkpoint(tmp_path, 4, model, optimizer, {}, keep=2)
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == ["step_00000003", "step_00000004"]
    save_checkpoint(tmp_path, 4, model, optimizer, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


@pytest.mark.parametrize("name", ["manifest.json", PART, "state.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "missing"])
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path, name, how):
    model, optimizer = new()
    for step in (1, 2):
        train(model, optimizer, step, step + 1)
        save_checkpoint(tmp_path, step, model, optimizer, {})
    file = tmp_path / "step_00000002" / name
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    file.unlink()
    if how != "missing":
        keep = {"flip": len(data), "cut": len(data) - 3, "empty": 0}[how]
        file.write_bytes(data[:keep])
    lines = []
    newest = latest_checkpoint(tmp_path, lines.append)
    assert newest.name == "step_00000001"
    assert len(lines) == 1 and "step_00000002" in lines[0]
    assert "\n" not in lines[0]
    file = newest / PART
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="all 2 checkpoints"):
        latest_checkpoint(tmp_path, lines.append)


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / ".tmp-step_00000007").mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "changes, tensor",
    [
        ({"hidden_size": 64}, "model.embed_tokens.weight"),
        ({"intermediate_size": 56}, "model.layers.0.mlp.down_proj.weight"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"num_key_value_heads": 1}, "k_proj"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_another_shape_is_refused_by_name(tmp_path, changes, tensor):
    model, optimizer = new()
    train(model, optimizer, 0, 1)
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    other, its_optimizer = new(**changes)
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(InputError, match=tensor) as error:
        load_checkpoint(path, other, its_optimizer)
    assert "\n" not in str(error.value)
    for name, p in other.named_parameters():
        assert torch.equal(p, before[name])
    assert not its_optimizer.state_dict()["state"]


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_full_disk_leaves_the_earlier_one(tmp_path, monkeypatch, kind):
    model, optimizer = new()
    save_checkpoint(tmp_path, 1, model, optimizer, {})

    def full(self, path, mode):
        if kind is OSError:
            raise OSError(errno.ENOSPC, "No space left on device")
        text = "Error while serializing: I/O error: No space left on device"
        raise SafetensorError(text)

    monkeypatch.setattr(FileSystem, "create_stream", full)
    with pytest.raises(InputError, match="No space left") as error:
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert verify_checkpoint(checkpoints(tmp_path)[0]) is None


def test_a_full_disk_at_the_last_file(tmp_path, monkeypatch):
    model, optimizer = new()
    save_checkpoint(tmp_path, 1, model, optimizer, {})

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(InputError, match="No space left"):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    model, optimizer = new()
    (tmp_path / ".tmp-step_00000001").mkdir(parents=True)
    (tmp_path / ".tmp-step_00000001" / PART).write_bytes(b"x")
    path = save_checkpoint(tmp_path, 1, model, optimizer, {})
    assert list(tmp_path.iterdir()) == [path]


def newest_manifest(folder):
    path = folder / "step_00000002" / "manifest.json"
    return path, json.loads(path.read_text())


@pytest.fixture
def two_steps(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    model, optimizer = new()
    for step in (1, 2):
        train(model, optimizer, step, step + 1)
        save_checkpoint(tmp_path, step, model, optimizer, {})
    return tmp_path


def test_a_manifest_must_list_every_part(two_steps):
    path, manifest = newest_manifest(two_steps)
    for name in list(manifest["files"]):
        fewer = {n: v for n, v in manifest["files"].items() if n != name}
        path.write_text(json.dumps({**manifest, "files": fewer}))
        assert name in verify_checkpoint(path.parent)
        lines = []
        taken = latest_checkpoint(two_steps, lines.append)
        assert taken.name == "step_00000001" and name in lines[0]


def test_a_manifest_of_a_newer_version_stops_the_search(two_steps):
    """Going on from the one before would delete what the newer one wrote."""
    path, manifest = newest_manifest(two_steps)
    path.write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(InputError, match="newer llama_tut"):
        latest_checkpoint(two_steps)
    for broken in ({"format": 1}, [], {**manifest, "step": 3}, {"format": 0}):
        path.write_text(json.dumps(broken))
        assert verify_checkpoint(path.parent)


def test_a_file_with_the_name_of_a_step_is_no_checkpoint(two_steps):
    stray = two_steps / "step_00000003"
    stray.write_text("hi")
    assert latest_checkpoint(two_steps).name == "step_00000002"
    model, optimizer = new()
    path = save_checkpoint(two_steps, 3, model, optimizer, {})
    assert path.is_dir() and verify_checkpoint(path) is None
    assert not list(two_steps.glob(".tmp*"))


@pytest.mark.parametrize("what", ["iterdir", "read_bytes", "stat", "open"])
def test_what_may_not_be_read_never_looks_like_nothing(
    two_steps, monkeypatch, what
):
    """As another user's folder; root may read all, so the refusal is made."""
    real = {"open": open}.get(what) or getattr(Path, what)

    def refuse(path, *rest, **options):
        if str(path).startswith(str(two_steps)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    if what == "open":
        monkeypatch.setattr("builtins.open", refuse)
    else:
        monkeypatch.setattr(Path, what, refuse)
    with pytest.raises(InputError, match=str(two_steps)) as error:
        latest_checkpoint(two_steps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "averages"])
def test_what_is_not_finite_is_never_saved(tmp_path, where, value):
    model, optimizer = new()
    train(model, optimizer, 0, 1)
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    weight = model.model.norm.weight
    broken = weight if where == "weights" else optimizer.state[weight]
    with torch.no_grad():
        (broken if where == "weights" else broken["exp_avg"])[3] = value
    with pytest.raises(InputError, match="not finite at step 2") as error:
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=1)
    assert "model.norm.weight" in str(error.value)
    assert "--resume" in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert latest_checkpoint(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saving_before_the_first_step_changes_nothing(tmp_path, name):
    """torch's helper makes a missing state by a step of length 0, counted."""
    model, optimizer = new(name)
    path = save_checkpoint(tmp_path, 0, model, optimizer, {})
    assert not optimizer.state
    unsaved = train(*new(name), 0, 5)
    assert train(model, optimizer, 0, 5) == unsaved
    model, optimizer = new(name)
    load_checkpoint(path, model, optimizer)
    assert train(model, optimizer, 0, 5) == unsaved
