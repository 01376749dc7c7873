"""tools/predictions and tools/statistics: files of answers, and two of them compared."""

import gzip

import pytest
from small_model import predictions

from llama_tut.tools.files import InputError, write_jsonl
from llama_tut.tools.predictions import read_predictions
from llama_tut.tools.statistics import mcnemar


def test_mcnemar_by_hand():
    first = predictions([1, 1, 1, 1, 1, 0, 1, 0])
    second = predictions([0, 0, 0, 0, 0, 1, 1, 0])
    assert mcnemar(first, second) == (5, 1, 14 / 64)
    assert mcnemar(second, first) == (1, 5, 14 / 64)
    assert mcnemar(first, first) == (0, 0, 1.0)
    assert mcnemar(first, second, "char") == (0, 0, 1.0)
    many = predictions([1] * 3000), predictions([0] * 1400 + [1] * 1600)
    assert mcnemar(*many)[2] < 1e-300
    with pytest.raises(InputError, match="differ in examples"):
        mcnemar(first, second[:-1])


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_prediction_files(tmp_path, name):
    file = tmp_path / name
    rows = [p | {"scores": [-1.5] * 4} for p in predictions([1, 0, 1])]
    write_jsonl(file, rows)
    written = file.read_bytes()
    assert read_predictions(file) == rows
    write_jsonl(file, rows)
    assert file.read_bytes() == written
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(InputError, match="cannot be written"):
        write_jsonl(tmp_path / "no" / name, rows)
    write_jsonl(file, [{"index": 0}])
    with pytest.raises(InputError, match="line 1: no label"):
        read_predictions(file)
    with pytest.raises(ValueError):
        write_jsonl(file, [{"index": float("nan")}])


def test_a_cut_file_is_one_line(tmp_path):
    file = tmp_path / "p.jsonl.gz"
    data = gzip.compress(b'{"index": 0}\n' * 1000)
    for cut in (data[:-20], b"no gzip", data[:12] + b"xx" + data[14:]):
        file.write_bytes(cut)
        with pytest.raises(InputError, match="p.jsonl.gz"):
            read_predictions(file)
