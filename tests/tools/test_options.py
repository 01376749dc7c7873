"""Options and presets."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from llama_tut.config import LlamaConfig
from llama_tut.tools.files import InputError
from llama_tut.tools.options import (
    PRESETS,
    TrainConfig,
    configure,
    flag,
    gradient_accumulation_steps,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_shared_out(name):
    config = configure({"preset": name})
    assert gradient_accumulation_steps(config, 1) >= 1
    if name == "laptop":
        assert gradient_accumulation_steps(config, 2) == 1
    else:
        assert config.tokens_per_step == 524_288
        assert gradient_accumulation_steps(config, 8) >= 1
        assert 9.99e9 < config.steps * config.tokens_per_step < 10.01e9


def test_the_command_line_has_every_option(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.delitem(sys.modules, "train", raising=False)
    import train as script

    text = script.build_parser().format_help()
    for one in (*fields(TrainConfig), *fields(LlamaConfig)):
        if one.name != "model":
            assert flag(one.name) in text
    line = ["--head-dim", "4", "--no-tie-word-embeddings", "--resume"]
    line += ["--warmup-steps", "3", "--learning-rate", "1e-3"]
    given = vars(script.build_parser().parse_args(line))
    assert given == {
        "head_dim": 4,
        "tie_word_embeddings": False,
        "resume": True,
        "warmup_steps": 3,
        "learning_rate": 1e-3,
    }


def test_given_options_win_over_the_preset():
    config = configure(
        {"preset": "h100", "steps": 7, "num_hidden_layers": 3, "beta2": 0.5}
    )
    assert (config.steps, config.beta2, config.seed) == (7, 0.5, 0)
    assert config.model == {
        **PRESETS["h100"]["model"],
        "num_hidden_layers": 3,
    }
    assert PRESETS["h100"]["model"]["num_hidden_layers"] == 12
    with pytest.raises(InputError, match="--hidden-sise is no option"):
        configure({"hidden_sise": 3})
