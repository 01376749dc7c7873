"""The picture and the table of a run."""

import json
import math

from llama_tut.tools.curves import draw_curves, report

LEVELS = {"uniform": 5.0, "bigram": 3.0}


def folder(tmp_path, choice):
    lines = []
    for step in range(1, 7):
        line = {"step": step, "tokens": 8 * step, "loss": 5.0 - step / 2}
        if step % 3 == 0:
            line["val_loss"] = line["loss"] + 0.1
            if choice:
                line["choice"] = 0.25 + step / 20
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    baselines = {"bigram at the boundary": 0.3, "word overlap": 0.4}
    about = {"config": {}, "choice": {**baselines, "chance": 0.25}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    return tmp_path


def texts(figure):
    return {
        text.get_text() for axes in figure.axes for text in axes.texts
    }  # fmt: skip


def test_a_run_without_choice_has_one_panel(tmp_path):
    figure = draw_curves(folder(tmp_path, choice=False), LEVELS)
    (axes,) = figure.axes
    training, validation = axes.lines[:2]
    assert training.get_ydata()[0] == 4.5 and len(training.get_xdata()) == 6
    assert list(validation.get_xdata()) == [24, 48]
    assert texts(figure) == {"uniform 5.00", "bigram 3.00"}
    figure.savefig(tmp_path / "a.png")


def test_choice_gets_a_panel_with_its_baselines(tmp_path):
    figure = draw_curves(folder(tmp_path, choice=True), LEVELS)
    assert len(figure.axes) == 2
    assert {"chance 25%", "word overlap 40%"} <= texts(figure)
    assert list(figure.axes[1].lines[0].get_ydata()) == [0.4, 0.55]


def test_the_table_stands_beside_what_needs_no_model():
    line = {"val_loss": 2.5, "choice": 0.5}
    table = list(report(line, LEVELS, lambda nats: 2 * nats, 40, {"x": 0.25}))
    assert table[1].split() == ["this", "model", "2.5000", "5.0000"]
    assert table[3].split() == ["bigram", "3.0000", "6.0000"]
    assert "40 items" in table[4]
    assert table[-2:] == [
        "this model               50.0%", "x                        25.0%"
    ]  # fmt: skip
    table = list(report({}, LEVELS, lambda nats: nats))
    assert "nan" in table[1] and len(table) == 4
    assert math.isnan(float(table[1].split()[-1]))
