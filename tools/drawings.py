"""The drawings of the documents, which are no plots: ``python -m tools.drawings`` writes them into ``docs/``.

An SVG is text that nobody wants to write; here a drawing is a function of a canvas. Widths allow for the widest of the
fonts that browsers take for the first one named.
"""

from collections.abc import Callable, Sequence
from html import escape

from ttt4rec import palette

from .documents import ROOT

INK, LINE, EDGE, PAPER = "#1f2430", "#5b6275", "#b9bfcc", "#ffffff"
OUTER, INNER = palette.LINEAR, palette.MLP  # the colours of the two loops
PALE = {OUTER: "#eef5fb", INNER: "#fdf0e6", palette.ATTENTION: "#e9f6ec", LINE: "#f2f3f6"}


class Canvas:
    """An SVG of some size."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts: list[str] = []
        self.width, self.height, self.title = width, height, title

    def frame(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        """A large box that others stand in."""
        self._rect(x, y, w, h, PALE[colour], colour, 12)

    def box(self, x: float, y: float, w: float, h: float, *lines: str, edge: str = EDGE, head: bool = True) -> None:
        """A box with centred lines, the first of them bold if it is a head."""
        self._rect(x, y, w, h, PAPER, edge, 7)
        first = y + h / 2 - (len(lines) - 1) * 8.5 + 4.5
        for i, line in enumerate(lines):
            bold = head and i == 0
            self.text(x + w / 2, first + 17 * i, line, size=13.5 if bold else 12.5, bold=bold, anchor="middle")

    def text(
        self, x: float, y: float, text: str, *, size: float = 12.5, bold: bool = False, anchor: str = "start",
        colour: str = INK,
    ) -> None:  # fmt: skip
        """A line of text."""
        weight = ' font-weight="bold"' if bold else ""
        where = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.parts.append(f'<text {where} font-size="{size:g}"{weight} fill="{colour}">{escape(text)}</text>')

    def circle(self, x: float, y: float, text: str, colour: str) -> None:
        """A circle with a name in it."""
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="21" fill="{PAPER}" stroke="{colour}" stroke-width="2"/>')
        self.text(x, y + 5, text, size=13.5, bold=True, anchor="middle")

    def path(self, d: str, colour: str = LINE, *, head: bool = True, dashed: bool = False) -> None:
        """A line, an arrow if it has a head."""
        end = f' marker-end="url(#arrow{colour[1:]})"' if head else ""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}{end}/>')

    def _rect(self, x: float, y: float, w: float, h: float, fill: str, edge: str, radius: float) -> None:
        where = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"'
        self.parts.append(f'<rect {where} fill="{fill}" stroke="{edge}"/>')

    def __str__(self) -> str:
        markers = "".join(
            f'<marker id="arrow{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
            for colour in (LINE, OUTER, INNER, palette.ATTENTION)
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{escape(self.title)}">'
        )
        paper = f'<rect width="{self.width}" height="{self.height}" fill="{PAPER}"/>'
        return "\n".join([head, f"<defs>{markers}</defs>", paper, *self.parts, "</svg>", ""])


def two_loops() -> Canvas:
    """Training around, the inner loop within it, forwards and back."""
    canvas = Canvas(
        1080, 500, "Training learns all weights; inside, each mini-batch of a sequence takes a gradient step"
    )
    canvas.frame(12, 12, 1056, 476, OUTER)
    canvas.text(30, 38, "Outer loop, training: learns all weights, W₀ among them", size=15, bold=True, colour=OUTER)
    canvas.frame(190, 62, 690, 272, INNER)
    canvas.text(
        208, 85, "Inner loop, in every call: learns W while it reads the sequence", size=15, bold=True, colour=INNER
    )
    canvas.box(24, 116, 142, 70, "tokens x", "L of them", "in mini-batches of K")
    canvas.box(24, 228, 142, 62, "projections", "q, k, v, rates η")
    canvas.path("M95 186V226")
    canvas.path("M166 259H178V151H203")
    for i, x in enumerate((226, 416, 606, 796)):
        canvas.circle(x, 151, f"W{'₀₁₂₃'[i]}", INNER)
    for i, x in enumerate((258, 448, 638)):
        canvas.box(x, 116, 126, 70, f"mini-batch {i + 1}", "one gradient step", "LN(f(k)) → v − k")
        canvas.path(f"M{x - 11} 151H{x - 2}", INNER)
        canvas.path(f"M{x + 126} 151H{x + 135}", INNER)
        canvas.path(f"M{x + 63} 186V214")
        canvas.box(x + 3, 216, 120, 34, "o = q + LN(f(q))", head=False)
        canvas.box(x, 290, 126, 32, "dW, dq, dk, dv, dη", edge=OUTER, head=False)
    canvas.path("M796 130V113", INNER)
    canvas.text(870, 107, "state: fixed size, kept for each user", anchor="end")
    for x in (381, 571):
        canvas.path(f"M{x} 233H{x + 70}", head=False)
    canvas.path("M761 233H893V151H906")
    way = "Way back: from the last mini-batch to the first; W comes from checkpoints, no graph is recorded"
    canvas.text(208, 279, way, colour=OUTER)
    for x in (638, 448):
        canvas.path(f"M{x} 306H{x - 62}", OUTER)
    canvas.path("M258 306H232", OUTER)
    canvas.text(213, 311, "dW₀", size=13, bold=True, anchor="middle", colour=OUTER)
    canvas.box(908, 116, 140, 70, "norm, gate,", "output projection", "y, like attention's")
    canvas.box(908, 228, 140, 62, "loss", "next item or token")
    canvas.path("M978 186V226")
    canvas.path("M978 290V306H766", OUTER)
    canvas.box(410, 386, 260, 62, "optimiser, e.g. Adam", "once for a batch of sequences")
    canvas.path("M213 318V417H408", OUTER)
    canvas.text(228, 372, "gradients of all weights", colour=OUTER)
    canvas.path("M410 434H95V292", OUTER)
    canvas.text(252, 457, "new weights, for the next batch", anchor="middle", colour=OUTER)
    canvas.text(690, 411, "Forward: black and orange. Backward: blue.")
    canvas.text(690, 430, "At inference the outer loop is gone; the inner one stays.")
    return canvas


def way_of_the_data() -> Canvas:
    """From a file to a loss and to a list, with shapes."""
    canvas = Canvas(1080, 300, "From a file of interactions to training and to recommendations, with shapes")
    green = palette.ATTENTION
    canvas.frame(12, 12, 350, 276, LINE)
    canvas.text(30, 38, "recsys/data", size=15, bold=True, colour=LINE)
    canvas.frame(376, 12, 446, 276, INNER)
    canvas.text(394, 38, "models, layers, operators", size=15, bold=True, colour=INNER)
    canvas.frame(836, 12, 232, 276, green)
    canvas.text(854, 38, "recsys", size=15, bold=True, colour=green)
    steps: Sequence[tuple[float, float, float, Sequence[str]]] = (
        (28, 62, 148, ("file", "user, item, time")),
        (196, 62, 148, ("interactions", "k-core filter")),
        (196, 170, 148, ("histories", "one flat array", "of item codes")),
        (28, 170, 148, ("windows", "many targets", "in one causal pass")),
        (392, 62, 130, ("embedding", "ids [B, L]", "→ h [B, L, C]")),
        (536, 62, 130, ("projections", "q, k, v [B, L, H, D]", "rates [B, L, H]")),
        (680, 62, 130, ("spans", "start and length", "of each sequence")),
        (680, 170, 130, ("inner loop", "all mini-batches,", "packed")),
        (536, 170, 130, ("output", "norm, gate,", "projection")),
        (392, 170, 130, ("blocks", "feed-forward,", "norms")),
        (852, 62, 200, ("loss", "softmax over all items,", "or negatives")),
        (852, 170, 200, ("scores, best items", "in blocks, or by an", "index of codes")),
    )
    for x, y, width, lines in steps:
        canvas.box(x, y, width, 78, *lines)
    for d in (
        "M176 101H194", "M270 140V168", "M196 209H178", "M522 101H534", "M666 101H678", "M745 140V168", "M680 209H668",
        "M536 209H524",
    ):  # fmt: skip
        canvas.path(d)
    canvas.path("M102 248V270H369V101H390")
    canvas.path("M457 248V272H829V209H850", INNER)
    canvas.path("M829 209V101H850", INNER)
    canvas.text(640, 266, "hidden states [B, L, C]", anchor="middle")
    return canvas


def step_record() -> Canvas:
    """What a stream keeps of a head between two tokens."""
    canvas = Canvas(1080, 276, "The record of a stream's head: weights, then a row for each token of the mini-batch")
    canvas.text(20, 26, "A stream's record of one head: one contiguous stretch of float32", size=15, bold=True)
    canvas.text(185, 54, "weights before this mini-batch", anchor="middle", colour=INNER)
    canvas.frame(20, 64, 330, 76, INNER)
    for x, name, size in ((32, "W1; b1", "[D + 1, 4D]"), (192, "W2; b2", "[4D + 1, D]")):
        canvas.box(x, 74, 146, 56, name, size, edge=INNER)
    rows = "K rows, filled as tokens come; at token K they are added to the weights"
    canvas.text(712, 54, rows, anchor="middle", colour=OUTER)
    canvas.frame(364, 64, 696, 76, OUTER)
    for i, name in enumerate(("token 1", "token 2", "token 3", "…", "token K")):
        canvas.box(376 + 136 * i, 74, 128, 56, *((name, "a row") if name != "…" else (name,)), edge=OUTER)
    canvas.path("M376 130L60 184", head=False, dashed=True)
    canvas.path("M504 130L1020 184", head=False, dashed=True)
    parts = {"k": "D", "U1": "4D", "X2": "4D", "U2": "D", "v": "D", "rate": "1", "ln a": "1"}
    left = 60
    for (name, size), width in zip(parts.items(), (110, 230, 230, 110, 110, 80, 90), strict=True):
        canvas.box(left, 184, width, 50, name, size, edge=OUTER)
        left += width
    caption = "TTT-MLP's row: inputs X and steps U of both layers; TTT-Linear's has k, U, v, rate and ln a"
    canvas.text(540, 260, caption, anchor="middle")
    return canvas


def service() -> Canvas:
    """Events into the log and into states; recommendations out of states, the log behind them."""
    canvas = Canvas(1080, 300, "Events go to the log first and then to users' states; recommendations come from states")
    green = palette.ATTENTION
    canvas.box(20, 40, 150, 66, "POST /events", "observe(users,", "items)")
    canvas.box(20, 190, 150, 66, "POST", "/recommendations", "recommend(users, k)")
    canvas.frame(200, 16, 850, 268, LINE)
    canvas.text(218, 40, "OnlineRecommender", size=15, bold=True, colour=LINE)
    canvas.box(220, 56, 220, 84, "event log", "SQLite, flushed first;", "several callers, one write", edge=OUTER)
    canvas.box(520, 56, 230, 84, "states of users", "a pool, least recently", "used ones are evicted", edge=INNER)
    canvas.box(820, 56, 210, 84, "snapshot", "a file, for a quick start", edge=LINE)
    canvas.box(520, 190, 230, 66, "hidden states", "one for each user", edge=INNER)
    canvas.box(820, 190, 210, 66, "index of items", "exact best k, unseen", edge=green)
    canvas.path("M170 73H218", OUTER)
    canvas.path("M440 84H518", INNER)
    canvas.text(480, 76, "1 token", anchor="middle")
    canvas.path("M440 118H518", INNER, dashed=True)
    canvas.text(480, 136, "history", anchor="middle")
    canvas.path("M750 84H818")
    canvas.path("M818 112H752", dashed=True)
    canvas.path("M635 140V188", INNER)
    canvas.path("M170 223H518")
    canvas.path("M750 223H818", INNER)
    canvas.path("M925 256V272H95V258", green)
    canvas.text(220, 212, "who is asked for")
    canvas.text(300, 266, "ten items for each user", colour=green)
    return canvas


def replay() -> Canvas:
    """Three segments forwards, and the way back over them."""
    canvas = Canvas(970, 262, "Forwards a checkpoint before each segment; backwards each segment is replayed from it")
    canvas.text(20, 38, "Forward", size=15, bold=True, colour=INNER)
    canvas.circle(131, 62, "W₀", INNER)
    canvas.path("M152 62H178", INNER)
    for i, x in enumerate((180, 470, 760)):
        canvas.box(x, 36, 180, 52, f"segment {i + 1}", "M mini-batches", edge=INNER)
        if i < 2:
            canvas.path(f"M{x + 180} 62H{x + 288}", INNER)
            canvas.text(x + 234, 54, "checkpoint", anchor="middle", colour=INNER)
            canvas.path(f"M{x + 234} 68V184H{x + 288}", dashed=True)
        canvas.box(x, 166, 180, 60, f"replay {i + 1}, forwards", "holds each state,", "then walks back", edge=OUTER)
    canvas.path("M131 83V184H178", dashed=True)
    canvas.text(20, 252, "Backward, from right to left: only dW goes from one segment to the one before", colour=OUTER)
    canvas.path("M850 88V164", OUTER)
    canvas.path("M760 210H652", OUTER)
    canvas.path("M470 210H362", OUTER)
    canvas.text(706, 226, "dW", anchor="middle", colour=OUTER)
    canvas.text(416, 226, "dW", anchor="middle", colour=OUTER)
    return canvas


DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "two-loops": two_loops,
    "way-of-the-data": way_of_the_data,
    "step-record": step_record,
    "service": service,
    "replay": replay,
}


def main() -> None:
    """Write all drawings."""
    for name, draw in DRAWINGS.items():
        (ROOT / "docs" / f"{name}.svg").write_text(str(draw()))


if __name__ == "__main__":
    main()
