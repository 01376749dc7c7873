"""Chapter 27: pictures in a text model, beyond the chapter's own checks."""

import copy
import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from small_model import caller, refused, save_small_model
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from llama_tut.config import LlamaConfig
from llama_tut.generate import generate
from llama_tut.model import LlamaForCausalLM
from llama_tut.multimodal import (
    Looking,
    PictureEncoder,
    PictureLlama,
    PictureLoader,
    build_picture_loader,
    build_pictures,
    load_pictures,
    patchify,
    picture_row,
    pixel_shuffle,
    read,
    save_pictures,
)
from llama_tut.pretraining import train
from llama_tut.tools.files import InputError
from llama_tut.tools.machine import RESULTS
from llama_tut.tools.moe_config import MoEConfig
from llama_tut.tools.on_ranks import on_ranks
from llama_tut.tools.options import configure
from llama_tut.tools.picture_config import PictureConfig, PictureOptions
from llama_tut.tools.pictures import prepare_pictures, write_picture
from llama_tut.tools.runs import read_metrics
from llama_tut.tools.tokenizers import read_tokenizer
from llama_tut.trainer import train_step
from llama_tut.weights import load_pretrained, save_pretrained

T = 24  # tokens of a row: start, eight places, two names in bytes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(text model, picture data): a random model over bytes, few digits."""
    root = tmp_path_factory.mktemp("pictures")
    text = save_small_model(root / "text")
    prepare_pictures("digits", text, root / "data", count=64)
    return text, root / "data"


@pytest.fixture(scope="module")
def config(folders):
    """Pictures of 8 x 16 for the small model."""
    encoder = LlamaConfig(1, 16, 32, 2, 2)
    text = load_pretrained(folders[0]).config
    return PictureConfig(text, encoder, 8, 16)


@pytest.fixture
def model(folders, config):
    """The small model, and a random encoder beside it."""
    torch.manual_seed(0)
    return PictureLlama(load_pretrained(folders[0]), config)


def prompts(config, count, words=()):
    """Ids [B, T] of rows that begin with a picture."""
    return torch.tensor([picture_row(list(words), config, 256)[0]] * count)


@pytest.mark.parametrize(("H", "W", "P"), [(8, 16, 4), (6, 4, 2), (5, 5, 5)])
def test_patches_are_those_of_unfold(H, W, P):
    x = torch.randn(3, H, W)
    wanted = F.unfold(x[:, None], P, stride=P).mT
    assert torch.equal(patchify(x, P), wanted)


@pytest.mark.parametrize(("rows", "columns", "R"), [(4, 6, 2), (3, 6, 3)])
def test_pixel_shuffle_is_pixel_unshuffle_with_channels_last(rows, columns, R):
    x = torch.randn(2, rows * columns, 5)
    grid = x.mT.reshape(2, 5, rows, columns)
    wanted = F.pixel_unshuffle(grid, R)  # [B, E * R * R, ...], E slowest
    wanted = wanted.view(2, 5, R * R, -1).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(pixel_shuffle(x, columns, R), wanted)


def test_each_patch_reaches_each_vector(config):
    """A causal mask in the encoder would leave the upper right half zero."""
    encoder = PictureEncoder(config).double()
    x = torch.randn(1, 8, 16, dtype=torch.double, requires_grad=True)
    for vector in encoder(x)[0]:
        (gradient,) = torch.autograd.grad(vector.sum(), x, retain_graph=True)
        assert (patchify(gradient, 4).abs().amax(-1) > 0).all()


def test_one_patch_is_where_its_place_says(config):
    """Equal patches in two places give different vectors."""
    out = PictureEncoder(config)(torch.ones(1, 8, 16))
    assert len({round(v.sum().item(), 5) for v in out[0]}) == 8


@torch.no_grad()
def test_without_a_picture_it_is_the_text_model(model, folders):
    text, ids = load_pretrained(folders[0]), torch.randint(0, 256, (2, 9))
    assert torch.equal(model(ids), text(ids))
    assert model(ids, targets=ids) == text(ids, targets=ids)
    names = {f"text.{name}" for name in text.state_dict()}
    assert names < model.state_dict().keys()


@torch.no_grad()
def test_features_stand_at_the_places_and_nowhere_else(model, config):
    ids = prompts(config, 2, [65, 66])
    features = torch.randn(2, 8, 32)
    x = model.embed(ids, features)
    assert torch.equal(x[:, 1:9], features)
    table = model.text.model.embed_tokens.weight
    assert torch.equal(x[:, [0, 9, 10]], table[[256, 65, 66]].expand(2, 3, 32))


def test_a_row_that_was_cut_is_refused_even_if_the_batch_adds_up(model):
    V = model.config.placeholder
    uneven = torch.tensor([[V] * 7 + [1, 1], [V] * 9])
    with pytest.raises(InputError, match="7.*8 vectors"):
        model(uneven, torch.zeros(2, 8, 16))
    with pytest.raises(InputError, match="cut"):
        model(torch.tensor([[1, 2]]), torch.zeros(1, 8, 16))


def test_gradients_reach_encoder_projector_and_text(model, config):
    ids = prompts(config, 2, [65])
    targets = torch.full_like(ids, -100)
    targets[:, -1] = 66
    model(ids, torch.rand(2, 8, 16), targets=targets).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@torch.no_grad()
def test_generate_with_a_cache_is_the_model_without(model, config):
    pictures = torch.rand(3, 8, 16)
    ids = prompts(config, 3)
    found = generate(Looking(model, pictures), ids, 5)
    for _ in range(5):
        ids = torch.cat([ids, model(ids, pictures)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)
    alone = generate(Looking(model, pictures[1:2]), prompts(config, 1), 5)
    assert torch.equal(found[1:2], alone)


def test_a_prompt_in_chunks_may_not_cut_the_picture(model, config):
    ids, looking = prompts(config, 1), Looking(model, torch.rand(1, 8, 16))
    with pytest.raises(InputError, match="cut"):
        generate(looking, ids, 2, chunk_size=4)
    whole = generate(looking, ids, 2, chunk_size=9)
    assert torch.equal(whole, generate(looking, ids, 2))


def test_read_stops_at_the_end(model):
    for row in read(model, torch.rand(4, 8, 16), end=256, max_new_tokens=6):
        assert len(row) <= 6 and 256 not in row


def make_loader(folders, config, split="train", **options):
    """A loader of the small data."""
    settings = dict(batch_size=4, sequence_length=T, config=config, end=256)
    return PictureLoader(folders[1], split, **(settings | options))


def test_only_the_answer_and_its_end_are_targets(folders, config):
    loader = make_loader(folders, config)
    tokenizer = read_tokenizer(folders[1] / "tokenizer")
    ids, pictures, targets = loader.next_batch()
    assert pictures.shape == (4, 8, 16) and 0 <= pictures.min()
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        learned = [t for t in wanted if t != -100]
        assert learned[-1] == 256 and wanted[:8] == [-100] * 8
        assert row[:9] == [256] + [config.placeholder] * 8
        assert row[9 : 8 + len(learned)] == learned[:-1]
        assert tokenizer.decode(learned[:-1]) in loader.texts


def test_ranks_share_the_rows_and_a_position_is_all_there_is(folders, config):
    whole = make_loader(folders, config, batch_size=8)
    ranks = [
        make_loader(folders, config, rank=r, world_size=2) for r in (0, 1)
    ]
    for _ in range(3):
        batch = whole.next_batch()
        parts = [loader.next_batch() for loader in ranks]
        for tensor, *halves in zip(batch, *parts, strict=True):
            assert torch.equal(tensor, torch.cat(halves))
    again = make_loader(folders, config, batch_size=8, position=8)
    whole.position = 8
    assert torch.equal(again.next_batch()[1], whole.next_batch()[1])
    seen = make_loader(folders, config, batch_size=64).next_batch()[1]
    assert len({p.numpy().tobytes() for p in seen}) == 64


def test_rows_that_would_be_cut_and_other_folders_are_refused(
    folders, config, tmp_path
):
    with pytest.raises(InputError, match="take at least"):
        make_loader(folders, config, sequence_length=14)
    with pytest.raises(InputError, match="no pictures"):
        PictureLoader(tmp_path, "train", 4, T, config=config)
    with pytest.raises(InputError, match="rows"):
        make_loader(folders, config, batch_size=65)


def test_accumulation_weighs_answers_of_different_lengths(
    folders, config, model
):
    steps = []
    for B in (8, 2, 1):
        one = copy.deepcopy(model)
        loader = make_loader(folders, config, batch_size=B)
        batches = [loader.next_batch() for _ in range(8 // B)]
        optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
        loss, _ = train_step(one, optimizer, batches, max_norm=0)
        steps.append(
            (loss, torch.cat([p.flatten() for p in one.parameters()]))
        )
    for loss, after in steps[1:]:
        assert math.isclose(loss, steps[0][0], rel_tol=1e-5)
        torch.testing.assert_close(after, steps[0][1], atol=1e-5, rtol=1e-4)


def test_flops_are_counted(model, config):
    for changed in (config, replace(config, shuffle=2)):
        one = PictureLlama(model.text, changed)
        ids = prompts(changed, 2, [65, 66])
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            _ = one(ids, torch.rand(2, 8, 16))
        said = ids.numel() * one.flops_per_token(ids.shape[1], training=False)
        assert math.isclose(said, counter.get_total_flops())
        assert one.flops_per_token(9) == 3 * one.flops_per_token(9, False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_loads_again(config, tied, tmp_path):
    text = replace(config.text, tie_word_embeddings=tied)
    config = replace(config, text=text, shuffle=2)
    model = PictureLlama(LlamaForCausalLM(text), config)
    save_pictures(model, tmp_path / "model")
    again = load_pictures(tmp_path / "model")
    assert again.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    hf = json.loads((tmp_path / "model" / "config.json").read_text())
    assert hf["model_type"] == "llama_tut_pictures"
    assert hf["image_token_id"] == 257
    with pytest.raises(InputError, match="model_type"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("preprocessor_config.json", None, "lacks preprocessor_config"),
        ("config.json", {"model_type": "llama"}, "cannot see"),
        ("config.json", {"vision_config": {}}, "config"),
        ("preprocessor_config.json", {"size": 3}, "has size 3"),
    ],
)
def test_a_damaged_folder_is_refused(model, tmp_path, file, damage, words):
    save_pictures(model, tmp_path / "model")
    path = tmp_path / "model" / file
    if damage is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(InputError, match=words):
        load_pictures(tmp_path / "model")


def options(folders, out, **others):
    """A run of four steps of eight pictures."""
    text, data = folders
    return configure(
        {
            "data": str(data), "out": str(out), "text_model": str(text),
            "steps": 4, "sequence_length": T, "micro_batch_size": 4,
            "tokens_per_step": 8 * T, "eval_rows": 16, "samples": 1,
            "sample_tokens": 4, "checkpoint_every": 2, "encoder_size": 16,
            "encoder_layers": 1, **others,
        },
        [PictureOptions],
    )  # fmt: skip


def run(config):
    """Train on pictures -> the lines of metrics.jsonl."""
    train(
        config,
        build_pictures,
        build_loader=build_picture_loader,
        save_model=save_pictures,
    )
    return read_metrics(f"{config.out}/metrics.jsonl")


def test_a_run_resumes_and_its_model_reads(folders, tmp_path, capsys):
    whole = run(options(folders, tmp_path / "whole"))
    assert whole[-1]["val_loss"] > 0
    half = options(folders, tmp_path / "half")
    shutil.copytree(tmp_path / "whole", half.out)
    shutil.rmtree(f"{half.out}/model")
    shutil.rmtree(f"{half.out}/checkpoints/step_00000004")
    lines = run(replace(half, resume=True))
    assert [x["loss"] for x in lines] == [x["loss"] for x in whole]
    ours = load_pictures(tmp_path / "half" / "model").state_dict()
    theirs = load_pictures(tmp_path / "whole" / "model").state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name])
    assert "resumed at step 2" in capsys.readouterr().out


def test_frozen_text_stays_and_the_encoder_moves(folders, tmp_path, capsys):
    run(options(folders, tmp_path / "run", freeze_text=True, steps=2))
    before = load_pretrained(folders[0]).state_dict()
    after = load_pictures(tmp_path / "run" / "model")
    for name, tensor in after.text.state_dict().items():
        assert torch.equal(tensor, before[name])
    torch.manual_seed(0)
    fresh = PictureEncoder(after.config).projector.weight
    assert not torch.equal(after.encoder.projector.weight, fresh)
    capsys.readouterr()


def test_a_text_model_in_bfloat16_is_trained_in_float32(
    folders, tmp_path, monkeypatch, capsys
):
    half = load_pretrained(folders[0], torch.bfloat16)
    shutil.copytree(folders[0], tmp_path / "text")
    save_pretrained(half, tmp_path / "text")
    run(options((tmp_path / "text", folders[1]), tmp_path / "run", steps=1))
    trained = load_pictures(tmp_path / "run" / "model")
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    mixed = PictureLlama(half, trained.config)  # as one was saved before
    save_pictures(
        mixed, tmp_path / "mixed", AutoTokenizer.from_pretrained(folders[0])
    )
    good = min((folders[1] / "examples").iterdir())
    call = caption(monkeypatch, capsys)
    asked = ("--model", tmp_path / "mixed", "--image", good)
    capsys.readouterr()
    refused(call(*asked), "mixes", "say which dtype")
    assert call(*asked, "--dtype", "float32")[0] == 0


def test_answers_have_no_special_tokens_of_their_own(
    folders, config, tmp_path
):
    """A tokenizer such as Llama 3's begins each text that it is given."""
    text, data = tmp_path / "text", tmp_path / "data"
    shutil.copytree(folders[0], text)
    file = text / "tokenizer.json"
    core = json.loads(file.read_text())
    token = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    core["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {
                "id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]
            }
        },
    }  # fmt: skip
    file.write_text(json.dumps(core))
    info = prepare_pictures("digits", text, data, count=8)
    plain = PictureLoader(folders[1], "val", 1, T, config=config, end=256)
    ours = PictureLoader(data, "val", 1, T, config=config, end=256)
    assert ours.answers == plain.answers
    assert info.val_tokens == sum(1 + len(ids) for ids in ours.answers)


def test_options_that_cannot_be(folders, config, tmp_path):
    with pytest.raises(InputError, match="without experts"):
        replace(config, text=MoEConfig(mlp="mixtral"))
    with pytest.raises(InputError, match="--text-model too"):
        configure({"freeze_text": True}, [PictureOptions])
    with pytest.raises(InputError, match="--patch-size"):
        configure({"patch_size": 0}, [PictureOptions])
    with pytest.raises(InputError, match="multiples of 3"):
        run(options(folders, tmp_path / "run", patch_size=3))


def caption(monkeypatch, capsys):
    """scripts/caption.py, called here."""
    return caller("caption", monkeypatch, capsys)


def test_caption_answers_and_refuses(
    model, folders, tmp_path, monkeypatch, capsys
):
    call = caption(monkeypatch, capsys)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    save_pictures(model, tmp_path / "model", tokenizer)
    good, other = sorted((folders[1] / "examples").iterdir())[:2]
    code, out, err = call("--model", tmp_path / "model", "--image", good)
    assert code == 0 and err == "" and out.endswith("\n")
    code, out, _ = call("--model", tmp_path / "model", "--image", good, other)
    assert code == 0 and out.startswith(f"{good}: ")
    text, large = tmp_path / "a.png", tmp_path / "b.png"
    text.write_text("no picture")
    write_picture(large, torch.zeros(9, 16))
    for image, words in (
        (tmp_path / "none.png", "no file"),
        (text, "no picture"),
        (large, "16 x 9 pixels, the model reads 16 x 8"),
    ):
        refused(call("--model", tmp_path / "model", "--image", image), words)
    refused(call("--model", folders[0], "--image", good), "cannot see")
    refused(call("--model", tmp_path / "no", "--image", good), "no folder")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    refused(call("--model", tmp_path / "model", "--image", good), "lacks")


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(folders, tmp_path, capsys):
    """The same losses, and the same weights on both ranks and in the folder."""
    alone = run(options(folders, tmp_path / "one"))
    both = on_two_ranks(folders, tmp_path / "two")
    for ours, theirs in zip(both, alone, strict=True):
        assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-4)
        assert math.isclose(
            ours["grad_norm"], theirs["grad_norm"], rel_tol=1e-3
        )
    capsys.readouterr()


def on_two_ranks(folders, out):
    """As `run`, on two processes."""
    os.environ["PICTURE_RUN"] = json.dumps([*map(str, folders), str(out)])
    on_ranks(2, two_ranks)
    return read_metrics(out / "metrics.jsonl")


def two_ranks():
    """What one of the two processes does."""
    text, data, out = json.loads(os.environ["PICTURE_RUN"])
    run(options((text, data), out))
    return 0


@pytest.mark.skipif(
    not (RESULTS / "pictures.json").exists(), reason="make pictures"
)
def test_the_result_file_says_what_the_chapter_says():
    found = json.loads((RESULTS / "pictures.json").read_text())
    kinds = {}
    for one in found["runs"]:
        kinds.setdefault(one["kind"], []).append(one)
    digits = kinds["digits"]
    assert len(digits) == 3 and min(r["real"] for r in digits) > 0.9
    for one in digits + kinds["words"]:
        for control in ("shuffled", "blank", "text alone"):
            assert one[control] < 0.04
    frozen = kinds["digits, text model frozen"]
    assert max(r["real"] for r in frozen) < 0.1
