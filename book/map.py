"""Draw the map of the book: what flows from a text file to a trained model.

python book/map.py    writes book/_static/map.svg

The page includes the drawing as text, so its boxes are links and its colours
follow the theme. Four hundred units are the width of a phone.
"""

from pathlib import Path

OUT = Path(__file__).parent / "_static" / "map.svg"

STYLE = """
.map { max-width: 30rem; width: 100%; height: auto; display: block;
  margin: 0 auto; font: 14px sans-serif; }
.map text { text-anchor: middle; fill: var(--pst-color-text-base, #222); }
.map .small { font-size: 12px; }
.map .key { font-size: 12px; text-anchor: start; }
.map rect { fill: none; stroke-width: 2; }
.map .plain { stroke: none; fill: rgba(128, 128, 128, 0.18); }
.map .target { stroke: #d55e00; } .map .build { stroke: #3391d6; }
.map .prove { stroke: #009e73; } .map .pretrain { stroke: #cc79a7; }
.map .measure { stroke: #e69f00; }
.map path { fill: none; stroke: rgb(128, 128, 128); stroke-width: 1.5;
  marker-end: url(#tip); }
.map a { text-decoration: none; }
.map a:hover text { text-decoration: underline; }
"""

# x, y, width of a box, its part, its notebook and its words.
CHAPTERS = [
    (10, 66, 84, "pretrain", "12_tokens", "11 Tokens"),
    (106, 66, 84, "pretrain", "13_loader", "12 Loader"),
    (210, 66, 84, "target", "02_config", "1 Config"),
    (306, 66, 84, "prove", "09_weights", "9 Weights"),
    (36, 194, 96, "build", "03_rmsnorm", "3 RMSNorm"),
    (152, 194, 96, "build", "05_attention", "5 Attention"),
    (268, 194, 96, "build", "06_mlp", "6 MLP"),
    (152, 244, 96, "build", "04_rope", "4 RoPE"),
    (22, 368, 112, "pretrain", "14_optimizer", "13 Optimizer"),
    (144, 368, 112, "pretrain", "16_distributed", "14 Ranks"),
    (266, 368, 112, "pretrain", "17_checkpoint", "15 Checkpoint"),
    (10, 514, 90, "prove", "11_generate", "10 Generate"),
    (110, 514, 90, "target", "10_hellaswag", "2 HellaSwag"),
    (210, 514, 84, "measure", "22_gpt2", "17 GPT-2"),
    (304, 514, 86, "measure", "23_scaling", "18 Scaling"),
]
# The same with a height: boxes around others, their words on top.
AROUND = [
    (10, 126, 380, 170, "build", "08_model", "8 Model"),
    (24, 158, 352, 128, "build", "07_block", "7 Block, L times"),
    (10, 336, 380, 74, "pretrain", "15_trainer", "16 Trainer"),
]
PLAIN = [
    (10, 10, 180, "a text file"),
    (210, 10, 180, "published weights"),
    (110, 442, 180, "a trained model"),
]
ARROWS = [
    "M52 40V64",  # text to tokens
    "M94 81H104",
    "M148 96V124",
    "M252 40V64",  # weights to config
    "M348 40V64",
    "M252 96V124",
    "M348 96V124",
    "M132 209H150",  # norm to attention
    "M248 209H266",
    "M200 244V226",  # rotation to attention
    "M100 296V334",  # loss and back
    "M300 336V298",
    "M200 410V440",
    "M130 472L66 512",  # trained model to its uses
    "M170 472L156 512",
    "M230 472L244 512",  # many of them: what did a change buy?
    "M270 472L334 512",
]
WORDS = [(120, 320, "loss"), (258, 320, "parameters")]
PARTS = [
    (4, "target", "I Target"),
    (76, "build", "II Build"),
    (146, "prove", "III Prove"),
    (222, "pretrain", "IV Pretrain"),
    (314, "measure", "V Measure"),
]


def link(stem, inside):
    """The drawing `inside` as a link to a chapter's page."""
    return f'<a href="../notebooks/{stem}.html">{inside}</a>'


def box(x, y, width, height, kind):
    """A rectangle with round corners."""
    size = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="5"'
    return f'<rect class="{kind}" {size}/>'


def words(x, y, text, kind=""):
    """A line of text, centred at x."""
    return f'<text class="{kind}" x="{x}" y="{y}">{text}</text>'


def drawing():
    """The whole picture, as SVG."""
    lines = []
    for x, y, width, text in PLAIN:
        lines.append(box(x, y, width, 30, "plain"))
        lines.append(words(x + width / 2, y + 20, text))
    for x, y, width, height, part, stem, text in AROUND:
        inside = box(x, y, width, height, part)
        lines.append(link(stem, inside + words(x + width / 2, y + 21, text)))
    for x, y, width, part, stem, text in CHAPTERS:
        inside = box(x, y, width, 30, part)
        lines.append(link(stem, inside + words(x + width / 2, y + 20, text)))
    lines += [f'<path d="{path}"/>' for path in ARROWS]
    lines += [words(*word, "small") for word in WORDS]
    for x, part, text in PARTS:
        lines.append(box(x, 566, 12, 12, part))
        lines.append(words(x + 18, 577, text, "key"))
    return "\n".join(lines)


DESCRIPTION = (
    "A text file becomes tokens (chapter 12) and rows (12). Config (1) and "
    "weights (9) come from published models. Both enter the model (8), which "
    "is a block (7), L times: RMSNorm (3), attention (5) with RoPE (4), MLP "
    "(6). The trainer (16) takes the loss and gives back parameters, with "
    "optimizer (13), ranks (14) and checkpoint (15). The trained model "
    "generates (10) and is scored on HellaSwag (2). Many trained models are "
    "compared: from GPT-2 to LLaMA (17), and by size (18)."
)
TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
    'markerWidth="6" markerHeight="6" orient="auto">'
    '<path d="M0 0L8 4L0 8z" style="fill: rgb(128, 128, 128); '
    'stroke: none; marker-end: none"/></marker></defs>'
)


def svg():
    """The file's text."""
    head = (
        '<svg class="map" xmlns="http://www.w3.org/2000/svg" '
        'viewBox="0 0 400 590" role="group" aria-label="Map of the book">'
    )
    parts = [head, f"<desc>{DESCRIPTION}</desc>", f"<style>{STYLE}</style>"]
    return "\n".join([*parts, TIP, drawing(), "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.write_text(svg())
