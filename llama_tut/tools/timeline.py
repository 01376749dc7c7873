"""Timeline: the bytes of a rank over one step, thinned and drawn."""

from collections import Counter

COLORS = {
    "parameters": "C0",
    "optimizer": "C5",
    "gradients": "C2",
    "gathered": "C4",
    "activations": "C1",
    "logits": "C3",
    "temporary": "0.6",
}


def thin(timeline, points=400):
    """{purpose: gigabytes at each of at most `points` moments}."""
    size = -(-len(timeline) // points)
    stretches = [timeline[i : i + size] for i in range(0, len(timeline), size)]
    tops = [max(part, key=Counter.total) for part in stretches]
    return {
        name: [round(top[name] / 1e9, 6) for top in tops] for name in COLORS
    }


def draw_timeline(ax, timeline, turn):
    """Stacked areas; timeline as `thin` returns it, turn in percent."""
    count = len(next(iter(timeline.values())))
    x = [100 * i / max(1, count - 1) for i in range(count)]
    ax.stackplot(
        x,
        *timeline.values(),
        labels=timeline,
        colors=[COLORS[name] for name in timeline],
    )
    ax.axvline(turn, color="0.3", lw=0.8)
    ax.set(xlabel="operations of a step, percent", ylabel="GB per rank")
    ax.set(xlim=(0, 100))
    ax.margins(y=0.08)
    ax.text(turn - 1, ax.get_ylim()[1] * 0.97, "forward", ha="right", va="top")
    ax.text(turn + 1, ax.get_ylim()[1] * 0.97, "backward", va="top")
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5)
    )
