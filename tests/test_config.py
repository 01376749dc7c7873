"""The config: real config.json files, and refusals by name."""

import dataclasses
import json

import pytest
import transformers

from llama_tut import config as module
from llama_tut.config import LlamaConfig, RopeScaling
from llama_tut.tools.devices import without_memory
from llama_tut.tools.files import InputError

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
VICUNA_7B_16K = LLAMA_3_8B | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "rope_scaling": {"factor": 4.0, "rope_type": "linear"},
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
REAL = {  # name: (config.json, parameters)
    "llama-3-8b": (LLAMA_3_8B, 8_030_261_248),
    "llama-3.1-8b-instruct": (LLAMA_31_8B_INSTRUCT, 8_030_261_248),
    "llama-3.2-1b": (LLAMA_32_1B, 1_235_814_400),
    "vicuna-7b-16k": (VICUNA_7B_16K, 6_738_415_616),
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
    scaling = ours.rope_scaling
    kind = "default" if scaling is None else scaling.rope_type
    assert theirs.rope_parameters["rope_type"] == kind


def test_details_of_llama_31():
    ours = LlamaConfig.from_hf(LLAMA_31_8B_INSTRUCT)
    assert ours.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert ours.eos_token_id == (128001, 128008, 128009)
    assert ours.to_hf()["eos_token_id"] == [128001, 128008, 128009]
    assert LlamaConfig.from_hf(LLAMA_32_1B).rope_scaling.factor == 32.0


MISTRAL_7B_V03 = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32768,
}


def test_mistral_without_a_window_is_a_llama():
    ours = LlamaConfig.from_hf(MISTRAL_7B_V03)
    assert count(ours) == 7_248_023_552
    theirs = transformers.MistralConfig(**MISTRAL_7B_V03)
    assert LlamaConfig.from_hf(theirs) == ours
    assert ours.to_hf()["model_type"] == "llama"
    assert LlamaConfig.from_hf(ours.to_hf()) == ours


def test_mistral_has_defaults_of_its_own():
    sizes = {name: MISTRAL_7B_V03[name] for name in module.NEEDED}
    theirs = transformers.MistralConfig(**sizes, sliding_window=None)
    given = sizes | {"model_type": "mistral", "sliding_window": None}
    assert LlamaConfig.from_hf(given) == LlamaConfig.from_hf(theirs)


def test_absent_entries_have_transformers_defaults():
    sizes = {name: SMOLLM2_135M[name] for name in module.NEEDED}
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
        ({"model_type": "qwen2"}, "model_type = 'qwen2'"),
        ({"model_type": "mistral"}, "sliding_window = 4096"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization"),
        ({"rope_scaling": {"type": "linear"}}, "linear rope lacks factor"),
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


HOSTILE = (True, -1, "x", [1], [{}], {"a": []}, {"rope_theta": "x"})
HOSTILE += (float("nan"), float("inf"), 10**18, 10**400, 1e300)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("name", [*SMOLLM2_135M, "quantization_config"])
def test_a_hostile_entry_is_read_or_refused_in_one_line(name, value):
    for hf in (SMOLLM2_135M | {name: value}, new_form(SMOLLM2_135M)):
        if "rope_parameters" in hf:
            hf["rope_parameters"] = value
        try:
            config = LlamaConfig.from_hf(hf)
            assert LlamaConfig.from_hf(config.to_hf()) == config
        except InputError as error:
            assert "\n" not in str(error)


def test_a_matrix_beyond_all_memory_is_refused():
    with pytest.raises(InputError, match="no memory holds"):
        LlamaConfig(hidden_size=2**30, vocab_size=2**30)


@pytest.mark.parametrize("name", module.NEEDED)
def test_a_missing_entry_is_named(name):
    hf = {k: v for k, v in SMOLLM2_135M.items() if k != name}
    with pytest.raises(InputError, match=f"config lacks {name}"):
        LlamaConfig.from_hf(hf)


def test_what_transformers_read_from_gguf_is_plain():
    note = {"quantization_config": {"quant_method": "gguf"}}
    hf = SMOLLM2_135M | note
    assert LlamaConfig.from_hf(hf) == LlamaConfig.from_hf(SMOLLM2_135M)


def test_a_reader_that_passes_over_shared_keys_expects_other_shapes():
    """As in meta-llama/llama3#129 and LlamaFactory#459: K becomes H."""
    for hf, shape in ((LLAMA_3_8B, [4096, 4096]), (SMOLLM2_135M, [576, 576])):
        wrong = {k: v for k, v in hf.items() if k != "num_key_value_heads"}
        names = {"right": LlamaConfig.from_hf(hf)}
        names["wrong"] = LlamaConfig.from_hf(wrong)
        tables = {}
        for name, config in names.items():
            with without_memory():
                model = transformers.LlamaForCausalLM(
                    transformers.LlamaConfig(**config.to_hf())
                )
            tables[name] = {
                k: list(p.shape) for k, p in model.named_parameters()
            }
        right, wrong = tables["right"], tables["wrong"]
        assert right.keys() == wrong.keys()  # no name tells
        misfits = [k for k in right if right[k] != wrong[k]]
        assert len(misfits) == 2 * hf["num_hidden_layers"]
        assert all(wrong[name] == shape for name in misfits)
