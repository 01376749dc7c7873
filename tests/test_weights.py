"""Real weights: by name, without copies, refused if they do not fit; and the way back."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llama_tut import weights
from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools import safetensors_folder
from llama_tut.tools.files import InputError
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.tools.safetensors_folder import INDEX, tensor_table
from llama_tut.weights import (
    empty_model,
    load_pretrained,
    load_state,
    save_pretrained,
)

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Small models with the other entries of the real ones' config.json.
FORMS = {
    "llama-3": {"rope_theta": 5e5, "rms_norm_eps": 1e-5},
    "llama-3.1": {
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 8.0, **LLAMA3_ROPE},
        "max_position_embeddings": 4096,
        "eos_token_id": [1, 8, 9],
    },
    "llama-3.2": {
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 32.0, **LLAMA3_ROPE},
        "max_position_embeddings": 4096,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "smollm2": {
        "rope_theta": 1e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "vicuna-16k": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "max_position_embeddings": 4096,
    },
    "smollm2-1.7b": {
        "rope_theta": 1.3e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "num_key_value_heads": 6,
    },
}
GATE = "model.layers.1.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def their_model(form):
    """A transformers model of one of the FORMS, with random weights."""
    entries = SIZES | FORMS[form]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**entries))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def our_model(**changes):
    """A small model of ours, with random weights."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def largest_difference(ours, theirs, T=40, first=0):
    """Of the logits, on random ids at positions first, first + 1, ..."""
    ids = torch.randint(ours.config.vocab_size, (2, T))
    positions = torch.arange(first, first + T)
    other = theirs(ids, position_ids=positions[None].expand(2, T)).logits
    return (ours(ids, position_ids=positions) - other).abs().max().item()


def one_line(error):
    """The message of a caught InputError, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# Loading


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_transformers_loads(form, shards, tmp_path):
    theirs = their_model(form)
    size = "60KB" if shards else "5GB"
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == shards
    ours = load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in ours.parameters())
    assert largest_difference(ours, theirs) < 2e-5
    # Past the context before stretching (64), near the longest (4,096).
    assert largest_difference(ours, theirs, first=4000) < 2e-5


@pytest.mark.parametrize("form", ["llama-3.1", "smollm2"])
def test_the_dtype_is_the_stored_one_or_the_asked_one(form, tmp_path):
    theirs = their_model(form).bfloat16()
    theirs.save_pretrained(tmp_path)
    stored = load_pretrained(tmp_path)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    wide = load_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for name, tensor in theirs.state_dict().items():
        if name in wide.state_dict():
            assert torch.equal(stored.state_dict()[name], tensor)
            assert torch.equal(wide.state_dict()[name], tensor.float())


def test_mistral_without_a_window_loads_and_is_saved_as_a_llama(tmp_path):
    sizes = SIZES | {"sliding_window": None, "rms_norm_eps": 1e-5}
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(**sizes)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "one")
    ours = load_pretrained(tmp_path / "one")
    assert largest_difference(ours, theirs) < 2e-5
    save_pretrained(ours, tmp_path / "two")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert type(again) is transformers.LlamaForCausalLM
    assert largest_difference(ours, again) < 2e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_each_file_is_opened_once(sharded, dtype, monkeypatch):
    """Once to map it; and a cast reads it through once more."""
    opened = []

    def count(path, *args, **kwargs):
        opened.append(Path(path).name)
        return safe_open(path, *args, **kwargs)

    monkeypatch.setattr(safetensors_folder, "safe_open", count)
    load_pretrained(sharded[0], dtype=dtype)
    assert sorted(opened) == [path.name for path in sharded[1]]


@pytest.mark.parametrize("layers", [1, 4, 100_000, 2_000_000_000])
def test_the_depth_is_checked_before_a_model_is_built(layers, tmp_path):
    save_pretrained(our_model(), tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["num_hidden_layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(hf))
    said = f"num_hidden_layers {layers}, the checkpoint has 3"
    with pytest.raises(InputError, match=said):
        load_pretrained(tmp_path)


def test_building_draws_no_random_number():
    state = torch.get_rng_state()
    model = empty_model(LlamaConfig(**SIZES))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_training_never_writes_to_the_file(tmp_path):
    save_pretrained(our_model(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = load_pretrained(tmp_path / "m")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_a_model_with_memory_is_filled_in_place(tmp_path):
    source = our_model()
    save_pretrained(source, tmp_path / "m")
    model = LlamaForCausalLM(source.config)
    held = list(model.parameters())
    places = [p.data_ptr() for p in held]
    load_state(model, tensor_table(tmp_path / "m"))
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert [p.data_ptr() for p in held] == places
    for a, b in zip(held, source.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_silent_cast_into_a_model_with_memory(tmp_path):
    save_pretrained(our_model().bfloat16(), tmp_path / "m")
    model = our_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match="bfloat16 .*float32"):
        load_state(model, tensor_table(tmp_path / "m"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# Tied heads, and a buffer of old files


@pytest.fixture
def tied(tmp_path):
    """(the tensors of a tied model, write them, the folder)."""
    folder = tmp_path / "tied"
    save_pretrained(our_model(tie_word_embeddings=True), folder)
    tensors = load_file(folder / "model.safetensors")
    return tensors, folder


def test_a_tied_file_lacks_the_head(tied):
    tensors, folder = tied
    assert "lm_head.weight" not in tensors
    model = load_pretrained(folder)
    assert model.output_weight is model.model.embed_tokens.weight


def test_a_tied_file_may_have_the_head(tied):
    tensors, folder = tied
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors")
    model = load_pretrained(folder)
    assert torch.equal(model.output_weight, tensors[EMBEDDING])


def test_a_tied_file_with_another_head_is_refused(tied):
    tensors, folder = tied
    tensors["lm_head.weight"] = tensors[EMBEDDING] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight differs"):
        load_pretrained(folder)


def test_an_untied_file_without_head_is_refused(tied):
    tensors, folder = tied
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lacks lm_head.weight"):
        load_pretrained(folder)


def test_the_angles_of_old_files_are_passed_over(tied):
    tensors, folder = tied
    for i in range(3):
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        tensors[name] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert "rotary" not in str(load_pretrained(folder).state_dict().keys())


# What does not fit


DAMAGE = {
    "missing": (lambda t: t.pop(GATE), f"lacks {GATE}"),
    "many missing": (lambda t: [t.pop(k) for k in list(t)[:9]], "and 6 more"),
    "unknown": (
        lambda t: t.update({"model.layers.1.mlp.bias": torch.ones(3)}),
        "no place for model.layers.1.mlp.bias",
    ),
    "one layer more": (
        lambda t: t.update({GATE.replace(".1.", ".3."): t[GATE] + 1}),
        "no place for model.layers.3.mlp.gate_proj.weight",
    ),
    "misshapen": (
        lambda t: t.update({GATE: t[GATE].T.contiguous()}),
        rf"{GATE} is \[48, 80\] in the checkpoint and \[80, 48\]",
    ),
    "quantised": (
        lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}),
        f"{GATE} is stored as torch.float8_e4m3fn",
    ),
    "mixed": (
        lambda t: t.update({GATE: t[GATE].bfloat16()}),
        "mixes torch.bfloat16, torch.float32",
    ),
}


@pytest.mark.parametrize("memory", [False, True], ids=["meta", "memory"])
@pytest.mark.parametrize("fault", DAMAGE)
def test_what_does_not_fit_is_named(fault, memory, tmp_path):
    spoil, said = DAMAGE[fault]
    source = our_model()
    save_pretrained(source, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    model = our_model() if memory else empty_model(source.config)
    if memory and fault == "mixed":
        said = f"{GATE} is torch.bfloat16"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(InputError, match=said) as error:
        load_state(model, tensor_table(tmp_path / "m"))
    one_line(error)
    for parameter in model.parameters():  # untouched
        assert parameter.is_meta or not parameter.any()


def test_a_mixed_file_loads_in_the_dtype_that_is_asked_for(tmp_path):
    save_pretrained(our_model(), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors[GATE] = tensors[GATE].bfloat16()
    save_file(tensors, path)
    model = load_pretrained(tmp_path / "m", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture
def sharded(tmp_path):
    """A sharded folder of transformers."""
    their_model("llama-3").save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    return tmp_path, shards


def test_half_of_the_shards(sharded):
    folder, shards = sharded
    for path in shards[::2]:
        path.unlink()
    with pytest.raises(InputError) as error:
        load_pretrained(folder)
    said = one_line(error)
    assert shards[0].name in said
    assert f"{len(shards[::2])} of {len(shards)} weight files" in said


def test_a_shard_cut_short(sharded):
    folder, shards = sharded
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    with pytest.raises(InputError, match="not a whole safetensors") as error:
        load_pretrained(folder)
    assert shards[1].name in one_line(error)


def test_a_shard_of_another_model(sharded):
    folder, shards = sharded
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(InputError, match="the checkpoint lacks"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"", b"not a tensor", b"PK\x03\x04" + bytes(100)], ids=repr
)
def test_what_is_not_safetensors(tmp_path, content):
    save_pretrained(our_model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a whole safetensors") as error:
        load_pretrained(tmp_path / "m")
    one_line(error)


def test_a_folder_without_weights_or_config(tmp_path):
    save_pretrained(our_model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(InputError, match="holds no model.safetensors"):
        load_pretrained(tmp_path / "m")
    (tmp_path / "m" / INDEX).write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        load_pretrained(tmp_path / "m")
    (tmp_path / "m" / INDEX).unlink()
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(InputError, match="no readable JSON") as error:
        load_pretrained(tmp_path / "m")
    one_line(error)
    (tmp_path / "m" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        load_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(InputError, match="holds no config.json"):
        load_pretrained(tmp_path / "m")


# Saving


def tiny_tokenizer():
    """A byte-level tokenizer of transformers with a vocabulary of 131."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=131, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_transformers_reads_what_we_save(is_tied, dtype, tmp_path):
    model = our_model(
        tie_word_embeddings=is_tied, bos_token_id=0, eos_token_id=(0, 5)
    ).to(dtype)
    tokenizer = tiny_tokenizer()
    save_pretrained(model, tmp_path / "a" / "b", tokenizer)
    auto = transformers.AutoModelForCausalLM
    theirs, report = auto.from_pretrained(
        tmp_path / "a" / "b", output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.dtype == dtype
    assert theirs.generation_config.eos_token_id == [0, 5]
    assert LlamaConfig.from_hf(theirs.config) == model.config
    theirs.float()
    assert largest_difference(model.float(), theirs) < 2e-5
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "a" / "b")
    text = "the brown fox the end"
    assert reader(text).input_ids == tokenizer(text).input_ids
    with safe_open(tmp_path / "a" / "b" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(form, tmp_path):
    """transformers -> ours -> transformers: every bit of every tensor."""
    theirs = their_model(form)
    theirs.save_pretrained(tmp_path / "one")
    ours = load_pretrained(tmp_path / "one")
    save_pretrained(ours, tmp_path / "two")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.config.rope_parameters == theirs.config.rope_parameters
    names = tensor_table(tmp_path / "one").keys()
    assert names == tensor_table(tmp_path / "two").keys()


def test_an_existing_folder_keeps_its_other_files(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    save_pretrained(our_model(), folder)
    wider = our_model(head_dim=16)
    save_pretrained(wider, folder)
    assert load_pretrained(folder).config == wider.config
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_in_shards_is_not_overwritten(sharded):
    with pytest.raises(InputError, match="in shards"):
        save_pretrained(our_model(), sharded[0])


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model = our_model()
    save_pretrained(model, tmp_path / "m")

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    for name in ("m", "new"):
        with pytest.raises(InputError, match="No space left") as error:
            save_pretrained(our_model(head_dim=16), tmp_path / name)
        one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert load_pretrained(tmp_path / "m").config == model.config


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "m").write_text("a file")
    with pytest.raises(InputError, match="cannot write a model"):
        save_pretrained(our_model(), tmp_path / "m")
    with pytest.raises(InputError, match="cannot write a model"):
        save_pretrained(our_model(), tmp_path / "m" / "below")
    assert (tmp_path / "m").read_text() == "a file"


SAVE_FOR_EVER = """
import sys, torch
from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.weights import save_pretrained

model = LlamaForCausalLM(LlamaConfig(hidden_size=256, vocab_size=4000))
print("go", flush=True)
while True:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(parameter.view(-1)[0] + 1)
    save_pretrained(model, sys.argv[1])
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    folder = tmp_path / "m"
    for wait in (0.4, 0.53, 0.61):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(folder)],
            stdout=subprocess.PIPE,
        )
        child.stdout.readline()
        deadline = time.time() + 30
        while not folder.exists() and time.time() < deadline:
            time.sleep(0.02)
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        model = load_pretrained(folder)
        for parameter in model.parameters():
            assert (parameter == parameter.view(-1)[0]).all()


# Memory, measured in a process of its own


PEAK = """
import sys, torch
from llama_tut.weights import load_pretrained

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1])

dtype = getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else None
before = kilobytes("VmRSS")
model = load_pretrained(sys.argv[1], dtype=dtype)
sum(p.sum() for p in model.parameters())
print(1024 * (kilobytes("VmHWM") - before))
"""
linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)


def peak(*args):
    """Peak memory of loading above the start, in bytes."""
    command = [sys.executable, "-c", PEAK, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@linux
def test_loading_takes_the_weights_and_no_more():
    assert peak(find_pretrained()) < 1.1 * 4 * 134_515_008


@linux
def test_loading_shards_takes_no_more(tmp_path):
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=20,
        num_attention_heads=8,
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config.to_hf())
    ).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="40MB")
    assert (tmp_path / INDEX).exists()
    N = theirs.num_parameters()
    assert peak(tmp_path) < 1.1 * 2 * N + 8e6  # 8 MB: code paged in


@linux
def test_a_cast_keeps_no_copy_of_the_original():
    assert peak(find_pretrained(), "bfloat16") < 1.15 * 2 * 134_515_008


# The real model


@pytest.fixture(scope="module")
def real():
    """(ours, transformers', ids [1, 2048] of real text)."""
    folder = find_pretrained()
    auto = transformers.AutoModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    modules = (random, inspect, json, subprocess, transformers.LlamaConfig)
    text = "\n".join(
        inspect.getdoc(member)
        for module in (*modules, random.Random, Path, str, dict, os)
        for _, member in sorted(vars(module).items())
        if callable(member) and inspect.getdoc(member)
    )
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :2048]
    assert ids.shape == (1, 2048)
    return load_pretrained(folder), auto.from_pretrained(folder), ids


@pytest.mark.slow
@torch.no_grad()
def test_real_logits_are_equal_far_into_a_text(real):
    ours, theirs, ids = real
    z, other = ours(ids), theirs(ids).logits
    assert (z - other).abs().max() < 1e-4
    assert torch.equal(z.argmax(-1), other.argmax(-1))


@pytest.mark.slow
@torch.no_grad()
def test_real_logits_are_equal_at_the_end_of_the_context(real):
    ours, theirs, ids = real
    positions = torch.arange(8192 - 256, 8192)
    z = ours(ids[:, :256], position_ids=positions)
    other = theirs(ids[:, :256], position_ids=positions[None]).logits
    assert (z - other).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@torch.no_grad()
def test_the_tolerance_finds_a_wrong_config(real, name):
    ours, theirs, ids = real
    wrong = {"rms_norm_eps": 1e-6, "rope_theta": 1e4}[name]
    config = replace(ours.config, **{name: wrong})
    changed = load_state(empty_model(config), tensor_table(find_pretrained()))
    difference = changed(ids[:, :64]) - theirs(ids[:, :64]).logits
    assert difference.abs().max() > 1e-3
