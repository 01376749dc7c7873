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
.map .start { stroke: #d55e00; } .map .build { stroke: #3391d6; }
.map .prove { stroke: #009e73; } .map .pretrain { stroke: #cc79a7; }
.map .measure { stroke: #e69f00; } .map .fast { stroke: #7570b3; }
.map .beyond { stroke: #8c564b; }
.map path { fill: none; stroke: rgb(128, 128, 128); stroke-width: 1.5;
  marker-end: url(#tip); }
.map a { text-decoration: none; }
.map a:hover text { text-decoration: underline; }
"""

# x, y, width of a box, its part, its notebook and its words.
CHAPTERS = [
    (10, 10, 180, "start", "01_tiny", "1 The whole thing, small"),
    (210, 10, 180, "start", "02_config", "2 The target"),
    (10, 106, 84, "pretrain", "12_tokens", "12 Tokens"),
    (106, 106, 84, "pretrain", "13_loader", "13 Loader"),
    (258, 106, 84, "prove", "09_weights", "9 Weights"),
    (36, 234, 96, "build", "03_rmsnorm", "3 RMSNorm"),
    (152, 234, 96, "build", "05_attention", "5 Attention"),
    (268, 234, 96, "build", "06_mlp", "6 MLP"),
    (152, 284, 96, "build", "04_rope", "4 RoPE"),
    (22, 440, 112, "pretrain", "14_optimizer", "14 Optimizer"),
    (144, 440, 112, "pretrain", "16_distributed", "16 Ranks"),
    (266, 440, 112, "pretrain", "17_checkpoint", "17 Checkpoint"),
    (22, 480, 356, "fast", "19_fast_training", "19 Fast training"),
    (10, 584, 180, "prove", "10_hellaswag", "10 HellaSwag"),
    (210, 584, 180, "prove", "11_generate", "11 Generation"),
    (10, 624, 180, "fast", "20_fast_scoring", "20 Fast scoring"),
    (210, 624, 180, "fast", "21_fast_generation", "21 Fast generation"),
    (10, 672, 180, "measure", "22_gpt2", "22 GPT-2 to LLaMA"),
    (210, 672, 180, "measure", "23_scaling", "23 Scaling"),
    (10, 720, 180, "beyond", "24_parallel", "24 Parallel"),
    (210, 720, 180, "beyond", "25_plan", "25 Planning"),
    (10, 760, 180, "beyond", "26_moe", "26 Experts"),
    (210, 760, 180, "beyond", "27_multimodal", "27 Pictures"),
]
# The same with a height: boxes around others, their words on top.
AROUND = [
    (10, 166, 380, 170, "build", "08_model", "8 Model"),
    (24, 198, 352, 128, "build", "07_block", "7 Block, L times"),
    (10, 376, 380, 146, "pretrain", "18_pretraining", "18 Pretraining"),
    (22, 402, 356, 30, "pretrain", "15_trainer", "15 Trainer"),
]
PLAIN = [
    (10, 56, 180, "a text file"),
    (210, 56, 180, "published weights"),
    (110, 544, 180, "a trained model"),
]
ARROWS = [
    "M52 86V104",  # text to tokens
    "M94 121H104",
    "M148 136V164",
    "M300 86V104",  # published weights
    "M300 136V164",
    "M132 249H150",  # norm to attention
    "M248 249H266",
    "M200 284V266",  # rotation to attention
    "M100 336V374",  # loss and back
    "M300 376V338",
    "M200 522V542",
    "M150 574L120 583",  # trained model to its uses
    "M250 574L280 583",
]
WORDS = [(120, 360, "loss"), (258, 360, "parameters")]
PARTS = [
    (10, 804, "start", "I The whole thing, small"),
    (210, 804, "build", "II Build"),
    (300, 804, "prove", "III Prove"),
    (10, 826, "pretrain", "IV Pretrain"),
    (210, 826, "fast", "V Make it fast"),
    (10, 848, "measure", "VI Measure"),
    (210, 848, "beyond", "VII Beyond"),
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
    for x, y, part, text in PARTS:
        lines.append(box(x, y, 12, 12, part))
        lines.append(words(x + 18, y + 11, text, "key"))
    return "\n".join(lines)


DESCRIPTION = (
    "The book begins with the whole thing, small (chapter 1), and with the "
    "target (2). A text file becomes tokens (12) and rows (13), or published "
    "weights are copied in (9). Both enter the model (8), which is a block "
    "(7), L times: RMSNorm (3), attention (5) with RoPE (4), MLP (6). "
    "Pretraining (18) is the trainer (15), which takes the loss and gives "
    "back parameters, with optimizer (14), ranks (16) and checkpoints (17), "
    "made fast in chapter 19. The trained model is scored on HellaSwag (10) "
    "and generates (11), and both are made fast (20, 21). Many trained models "
    "are compared: from GPT-2 to LLaMA (22), and by size (23). Beyond them, "
    "a model is spread over many devices (24), planned before it is run (25), "
    "given experts (26), and taught to see (27)."
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
        'viewBox="0 0 400 868" role="group" aria-label="Map of the book">'
    )
    parts = [head, f"<desc>{DESCRIPTION}</desc>", f"<style>{STYLE}</style>"]
    return "\n".join([*parts, TIP, drawing(), "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.write_text(svg())
