"""Options and presets."""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from llama_tut.config import LlamaConfig, option
from llama_tut.tools.files import InputError
from llama_tut.tools.options import (
    PRESETS,
    TrainConfig,
    changes,
    check_choices,
    configure,
    extra_options,
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
        if one.name not in ("model", "extra"):
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


@dataclass(frozen=True)
class Sugar:
    """Options of a chapter that this file has never heard of."""

    kind: Literal["cane", "beet"] = option("cane", "where it comes from")
    lumps: int = option(2, "how many")

    def __post_init__(self):
        check_choices(self)


def test_a_later_chapter_adds_options(tmp_path):
    config = configure({"steps": 3, "lumps": 5, "hidden_size": 8}, [Sugar])
    assert config.extra == {"lumps": 5} and config.steps == 3
    assert extra_options(config, Sugar) == Sugar("cane", 5)
    with pytest.raises(InputError, match="--kind 'maple': take cane or beet"):
        configure({"kind": "maple"}, [Sugar])
    with pytest.raises(InputError, match="--lumps is no option"):
        configure({"lumps": 5})
    about = {"config": asdict(config), "data": {}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    given = {"out": str(tmp_path), "resume": True}
    again = configure(given | {"kind": "beet"}, [Sugar])
    assert extra_options(again, Sugar) == Sugar("beet", 5)
    lines = list(changes({"config": asdict(config)}, again))
    assert lines == []  # it had no kind yet
    before = configure({"kind": "cane", "out": "a"}, [Sugar])
    lines = list(changes({"config": asdict(before)}, again))
    assert "--kind was cane, from here on it is beet" in lines
    del about["config"]["extra"]  # of an older version
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert configure(given, [Sugar]).extra == {}
