"""Draw the whole book as one picture, once for each chapter.

python book/draw.py    writes book/_static/here/NAME.svg for every chapter

Text goes in at the top, the model is on the left, training on the right. The
chapter's own pieces are in colour, and a pin says "you are here". The drawing
has a white ground, so it reads the same on a dark page; 412 units are the
width of a phone, and no text is smaller than 12 of them.
"""

from pathlib import Path

OUT = Path(__file__).parent / "_static" / "here"
WIDTH, HEIGHT = 412, 568

MODEL = "model block embedding stream norm attention rope mlp head"
TRAINER = "trainer checkpoint optimizer distributed loss"
RUN = f"text tokens ids loader targets probabilities {TRAINER} {MODEL}"
TINY = f"text ids {MODEL} probabilities generate loss optimizer"
# chapter: the words beside "you are here", its pieces, and where the pins are
CHAPTERS = {
    "tiny": ("all of it, small", TINY, [(44, 135)]),
    "config": ("the config, a model in a few numbers", "config", [(384, 134)]),
    "rmsnorm": ("RMSNorm", "norm", [(136, 220), (136, 290), (102, 368)]),
    "rope": ("RoPE, rotary positions", "rope", [(236, 258)]),
    "attention": ("attention", "attention rope", [(236, 219)]),
    "mlp": ("the MLP", "mlp", [(236, 289)]),
    "block": (
        "the block",
        "block stream norm attention rope mlp",
        [(242, 182)],
    ),
    "model": ("the model", MODEL, [(44, 135)]),
    "weights": ("published weights", "weights", [(384, 172)]),
    "hellaswag": ("HellaSwag", "hellaswag", [(24, 493)]),
    "generate": ("generation", "generate", [(112, 434)]),
    "tokens": ("the tokenizer", "text tokens ids", [(240, 46)]),
    "loader": ("the loader", "loader targets", [(384, 46)]),
    "optimizer": ("the optimizer", "optimizer", [(384, 318)]),
    "trainer": ("the trainer", TRAINER, [(288, 233)]),
    "distributed": ("many ranks, one step", "distributed", [(384, 371)]),
    "checkpoint": ("checkpoints", "checkpoint", [(384, 267)]),
    "pretraining": ("one real run, from text to model", RUN, [(288, 233)]),
    "fast_training": (
        "training, made fast",
        "trainer fast_training",
        [(384, 238)],
    ),
    "fast_scoring": (
        "scoring, made fast",
        "hellaswag fast_scoring",
        [(134, 497)],
    ),
    "fast_generation": (
        "generation, made fast",
        "generate fast_generation",
        [(30, 410)],
    ),
    "gpt2": ("from GPT-2 to LLaMA", "gpt2", [(278, 494)]),
    "scaling": ("ten times the compute", "scaling", [(388, 494)]),
    "parallel": (
        "one model on many ranks",
        "model distributed parallel",
        [(24, 531)],
    ),
    "plan": ("a step, planned", "plan", [(188, 531)]),
    "multimodal": ("pictures", "multimodal stream", [(388, 531)]),
    "moe": ("many MLPs, a few for each token", "mlp moe", [(236, 289)]),
}

STYLE = """
text { font: 13px Helvetica, Arial, "DejaVu Sans", sans-serif; fill: #343a40;
  text-anchor: middle; }
.start { text-anchor: start; }
.end { text-anchor: end; }
.note { font-size: 12px; fill: #5c636a; }
.title { font-size: 14px; text-anchor: start; }
.bold { font-weight: bold; }
rect { fill: #f3f4f6; stroke: #adb5bd; stroke-width: 1.2; }
.page { fill: #ffffff; stroke: #dee2e6; }
.frame { fill: #ffffff; }
.stack { fill: #ffffff; stroke: #ced4da; }
.bar { fill: #ced4da; stroke: none; }
.line { fill: none; stroke: #868e96; stroke-width: 1.4; }
.tip { fill: #868e96; }
.stream { fill: none; stroke: #868e96; stroke-width: 4; }
.plus { fill: #ffffff; stroke: #868e96; stroke-width: 1.4; }
.bolt { fill: #868e96; }
.on rect { fill: #fde8d9; stroke: #d55e00; stroke-width: 2; }
.on rect.frame, .on rect.stack { fill: #fff7f1; stroke: #d55e00; }
.on rect.bar { fill: #d55e00; stroke: none; }
.on text { fill: #8a3d00; font-weight: bold; }
.on text.note { font-weight: normal; }
.on .line, .on .stream, .on .plus { stroke: #d55e00; }
.on .tip, .on .bolt { fill: #d55e00; }
.pin { fill: #d55e00; stroke: #ffffff; stroke-width: 1.2; }
.eye { fill: #ffffff; }
""".strip()


def box(x, y, width, height, words="", kind=""):
    """A rectangle with round corners, and words in its middle."""
    shape = (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" '
        f'height="{height}" rx="5"/>'
    )
    if words:
        shape += text(x + width / 2, y + height / 2 + 4.5, words)
    return shape


def text(x, y, words, kind=""):
    """One line of text; `kind` is a class of the style."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def arrow(*points, kind="line"):
    """A line through the points (x, y) with a tip at its end."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    back = f"{x - 7 * dx - 4 * dy:g} {y - 7 * dy - 4 * dx:g}"
    other = f"{x - 7 * dx + 4 * dy:g} {y - 7 * dy + 4 * dx:g}"
    return (
        f'<path class="{kind}" d="{path}"/>'
        f'<path class="tip" d="M{x:g} {y:g}L{back}L{other}z"/>'
    )


def plus(x, y):
    """The sign that adds to the residual stream."""
    return (
        f'<circle class="plus" cx="{x}" cy="{y}" r="8"/>'
        f'<path class="line" d="M{x - 4} {y}H{x + 4}M{x} {y - 4}V{y + 4}"/>'
    )


def fast(x, y):
    """The lightning that marks what a later chapter makes fast."""
    flash = f"M{x + 12} {y + 3}l-5 8h4l-2 6l6 -8h-4l3 -6z"
    return (
        box(x, y, 50, 20)
        + f'<path class="bolt" d="{flash}"/>'
        + text(x + 31, y + 14.5, "fast", "note")
    )


def pin(x, y):
    """A map's pin whose point is at (x, y)."""
    head = f"M{x} {y}C{x - 3} {y - 7} {x - 8} {y - 10} {x - 8} {y - 15}"
    head += f"a8 8 0 0 1 16 0C{x + 8} {y - 10} {x + 3} {y - 7} {x} {y}z"
    eye = f'<circle class="eye" cx="{x}" cy="{y - 15}" r="3"/>'
    return f'<path class="pin" d="{head}"/>{eye}'


STREAM = 72  # x of the residual stream


def pieces():
    """[(name, drawing)] in the order of drawing, back to front."""
    ids = "".join(
        box(60 + 38 * k, 92, 38, 22, number)
        for k, number in enumerate(("464", "3797", "3332", "319"))
    )
    bars = "".join(
        f'<rect class="bar" x="{160 + 12 * k}" y="{456 - h}" width="9" '
        f'height="{h}"/>'
        for k, h in enumerate((5, 9, 30, 14, 4, 7, 3))
    )
    return [
        ("model", box(32, 132, 226, 270, kind="frame")),
        ("model", text(250, 150, "model", "end bold")),
        ("block", box(52, 182, 200, 172, kind="stack")),
        ("block", box(48, 178, 200, 172, kind="frame")),
        ("block", text(84, 196, "block, L times", "start")),
        # down the left: text to ids to the stream
        ("text", box(32, 42, 104, 26, "The cat sat on")),
        ("text", arrow((136, 55), (154, 55))),
        ("tokens", box(154, 42, 92, 26, "tokenizer")),
        ("ids", arrow((200, 68), (200, 91)) + ids),
        ("ids", text(216, 108, "[B, T]", "note start")),
        ("embedding", arrow((STREAM, 114), (STREAM, 139))),
        ("embedding", box(48, 140, 92, 26, "embedding")),
        ("embedding", text(146, 158, "[B, T, D]", "note start")),
        ("stream", arrow((STREAM, 166), (STREAM, 364), kind="stream")),
        # attention's branch
        ("norm", arrow((STREAM, 229), (92, 229))),
        ("norm", box(92, 217, 50, 24, "norm")),
        ("attention", arrow((142, 229), (156, 229))),
        ("attention", box(156, 215, 84, 28, "attention")),
        ("attention", arrow((166, 243), (166, 270), (STREAM + 8, 270))),
        ("attention", plus(STREAM, 270)),
        (
            "rope",
            arrow((210, 254), (210, 244)) + box(182, 254, 58, 22, "RoPE"),
        ),
        # the MLP's branch
        ("norm", arrow((STREAM, 299), (92, 299))),
        ("norm", box(92, 287, 50, 24, "norm")),
        ("mlp", arrow((142, 299), (156, 299))),
        ("moe", box(162, 279, 84, 28) + box(159, 282, 84, 28)),
        ("mlp", box(156, 285, 84, 28, "MLP")),
        ("mlp", arrow((198, 313), (198, 334), (STREAM + 8, 334))),
        ("mlp", plus(STREAM, 334)),
        # out: norm, head, probabilities, next token
        ("norm", box(48, 365, 60, 26, "norm")),
        ("head", arrow((108, 378), (156, 378))),
        ("head", box(156, 364, 84, 28, "head")),
        ("probabilities", arrow((198, 392), (198, 422))),
        ("probabilities", text(206, 417, "[B, T, V]", "note start")),
        ("probabilities", bars),
        ("probabilities", text(200, 471, "probabilities", "note")),
        ("generate", arrow((154, 444), (120, 444))),
        ("generate", box(52, 431, 68, 26, "the")),
        ("generate", text(86, 471, "next token", "note")),
        ("generate", arrow((52, 444), (18, 444), (18, 103), (59, 103))),
        ("fast_generation", fast(5, 407)),
        # on the right: where rows and weights come from
        ("loader", arrow((246, 55), (286, 55))),
        ("loader", box(286, 42, 104, 26, "loader")),
        ("loader", arrow((306, 68), (306, 103), (256, 103))),
        ("config", box(286, 130, 104, 26, "config")),
        ("config", arrow((286, 143), (259, 143))),
        ("weights", box(286, 168, 104, 38)),
        ("weights", text(338, 184, "published") + text(338, 199, "weights")),
        ("weights", arrow((286, 187), (259, 187))),
        ("trainer", box(276, 230, 122, 246, kind="frame")),
        ("trainer", text(286, 249, "trainer", "start bold")),
        ("fast_training", fast(340, 235)),
        ("checkpoint", arrow((338, 314), (338, 290))),
        ("checkpoint", box(286, 263, 104, 26, "checkpoint")),
        ("optimizer", box(286, 314, 104, 26, "optimizer")),
        ("optimizer", arrow((286, 327), (259, 327))),
        ("distributed", arrow((338, 367), (338, 341))),
        ("distributed", box(286, 367, 104, 26, "ranks: mean")),
        ("loss", arrow((338, 431), (338, 394))),
        ("loss", text(344, 417, "gradients", "note start")),
        ("loss", box(286, 431, 104, 26, "loss")),
        ("loss", arrow((252, 444), (285, 444))),
        (
            "targets",
            arrow((374, 68), (374, 112), (405, 112), (405, 444), (391, 444)),
        ),
        ("targets", text(368, 88, "targets", "note end")),
        # below: what trained models are measured by
        ("hellaswag", box(16, 490, 128, 28) + text(54, 508.5, "HellaSwag")),
        ("fast_scoring", fast(91, 494)),
        ("gpt2", box(156, 490, 130, 28, "GPT-2 or LLaMA?")),
        ("scaling", box(298, 490, 98, 28, "scaling")),
        # what goes beyond
        ("parallel", box(16, 527, 86, 28, "many ranks")),
        ("plan", box(110, 527, 86, 28, "plan")),
        ("multimodal", box(298, 527, 98, 28, "pictures")),
    ]


DESCRIPTION = (
    "Text becomes token ids of shape [B, T], an embedding turns them into the "
    "residual stream [B, T, D]. Each of L blocks reads the stream through a "
    "norm, and adds what attention, with rotary positions, and then the MLP "
    "give. A last norm and the head give logits [B, T, V], hence the "
    "probabilities of the next token, which is appended to the ids. On the "
    "right, the trainer takes the loss, averages gradients over ranks, and "
    "its optimizer updates the model. You are here: {}."
)


def svg(chapter):
    """The text of the chapter's file."""
    words, names, pins = CHAPTERS[chapter]
    names = names.split()
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * 1.1:g}" '
        f'height="{HEIGHT * 1.1:g}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>You are here: {words}</title>",
        f"<desc>{DESCRIPTION.format(words)}</desc>",
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="page" x="0.6" y="0.6" width="{WIDTH - 1.2:g}" '
        f'height="{HEIGHT - 1.2:g}" rx="10"/>',
        pin(24, 30),
        f'<text class="title" x="38" y="24">'
        f'<tspan class="bold">You are here:</tspan> {words}</text>',
    ]
    for name, drawing in pieces():
        on = name in names
        lines.append(f'<g class="on">{drawing}</g>' if on else drawing)
    lines += [pin(x, y) for x, y in pins]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for chapter in CHAPTERS:
        (OUT / f"{chapter}.svg").write_text(svg(chapter))


if __name__ == "__main__":
    main()
