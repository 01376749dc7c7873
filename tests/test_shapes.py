"""The shape comments are true: each forward is traced with a different size for every letter.

A line such as `q = self.q_proj(x).view(shape)  # [B, H, T, C]` is run, its
comment evaluated with the sizes of the test, and the shape of what it
assigned or returned compared. A tensor assigned to a name, or returned,
without a comment is an error too.
"""

import ast
import io
import linecache
import re
import sys
import textwrap
import tokenize
import types
from pathlib import Path

import pytest
import torch

from llama_tut import attention, block, mlp, model, rmsnorm, rope
from llama_tut.config import LlamaConfig, RopeScaling
from llama_tut.fast import training
from llama_tut.model import LlamaForCausalLM

MODULES = (rmsnorm, rope, attention, mlp, block, model)
SHAPE = re.compile(r"\[[^\]]*\]")
COMMENT = re.compile(r"#\s*(\[[^\]]*\](?:,\s*\[[^\]]*\])*)")

# All different, as are the products and halves in the comments.
LETTERS = {"B": 5, "T": 26, "D": 42, "H": 6, "K": 2, "C": 14, "I": 36}
LETTERS |= {"V": 58, "G": 3, "L": 2}
# Tiles of the head's loss: two of the rows, two of the words.
TILE = {"R": 65, "M": 29}


class WrongShape(AssertionError):
    """file:line, what the comment says, what is true."""


class Statement:
    """One assignment or return: its lines, its targets, its comment."""

    def __init__(self, node, comments):
        self.node = node
        last = node.end_lineno
        if isinstance(node, ast.For):  # only the header
            last = node.body[0].lineno - 1
        self.line = last
        self.lines = range(node.lineno, last + 1)
        found = COMMENT.match(comments.get(last, ""))
        self.shapes = SHAPE.findall(found[1]) if found else None

    def results(self, frame, value):
        """What the statement made: [(name, object)]."""
        if isinstance(self.node, ast.Return):
            if isinstance(self.node.value, ast.Tuple):
                return [("return value", v) for v in value]
            return [("return value", value)]
        targets = getattr(self.node, "targets", None) or [self.node.target]
        if isinstance(targets[0], ast.Tuple):
            targets = targets[0].elts
        return [
            (t.id, frame.f_locals.get(t.id))
            if isinstance(t, ast.Name)
            else (ast.unparse(t), None)
            for t in targets
        ]


def statements(source, filename):
    """{line: innermost assignment, loop header or return on it}."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    kinds = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.For)
    table = {}
    for node in ast.walk(ast.parse(source, filename)):
        if isinstance(node, kinds):
            statement = Statement(node, comments)
            for line in statement.lines:
                table[line] = statement
    return table


def sizes(text, names):
    """'[B, H, G*T, C/2]' -> ((3, 6, 69, 5), False); True: any axes before."""
    terms = [t.strip() for t in text[1:-1].split(",") if t.strip()]
    open_ended = terms[:1] == ["..."]
    values = []
    for term in terms[open_ended:]:
        value = eval(term, {"__builtins__": {}}, names)
        if value != int(value):
            raise ValueError(f"{term} = {value} is no whole number")
        values.append(int(value))
    return tuple(values), open_ended


class Tracer:
    """Compares comments with shapes while the given files run.

    Args:
        letters: {letter: size}.
        own_first: where a function has a number of its own named T or S (a
            block of queries), that is the letter's size in it. Else its
            numbers must be those of `letters`.
    """

    def __init__(self, filenames, letters, own_first=False):
        self.own_first = own_first
        self.tables = {
            name: statements("".join(linecache.getlines(name)), name)
            for name in filenames
        }
        self.letters = letters
        self.errors = []
        self.checked = set()

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *args):
        sys.settrace(self.before)

    def call(self, frame, event, value):
        code = frame.f_code
        table = self.tables.get(code.co_filename)
        if table is None or code.co_name.startswith("<"):
            return None  # another file, or a comprehension
        running = None

        def step(frame, event, value):
            nonlocal running
            now = table.get(frame.f_lineno)
            if event == "exception":
                running = None
            elif event == "return":
                if running is not None:
                    self.check(running, frame, value)
            elif event == "line" and now is not running:
                if running is not None:
                    self.check(running, frame, value)
                running = now
            return step

        return step

    def check(self, statement, frame, value):
        place = f"{frame.f_code.co_filename}:{statement.line}"
        results = statement.results(frame, value)
        tensors = [isinstance(v, torch.Tensor) for _, v in results]
        if statement.shapes is None:
            if any(tensors) and not isinstance(statement.node, ast.For):
                name, v = results[tensors.index(True)]
                self.errors.append(
                    f"{place}: {name} {list(v.shape)} has no shape comment"
                )
            return
        if not any(tensors):
            return  # None, or a tuple handed through
        if len(statement.shapes) != len(results):  # None has no shape
            results = [r for r in results if isinstance(r[1], torch.Tensor)]
        if len(statement.shapes) != len(results):
            self.errors.append(
                f"{place}: {len(statement.shapes)} shapes for "
                f"{len(results)} results"
            )
            return
        own = {
            k: v
            for k, v in frame.f_locals.items()
            if isinstance(v, int) and k in LETTERS | {"S": 0}
        }
        for k, v in own.items() if not self.own_first else ():
            if self.letters.get(k, v) != v:
                self.errors.append(f"{place}: {k} is {v} here")
        names = self.letters | (own if self.own_first else {})
        for text, (name, v) in zip(statement.shapes, results, strict=True):
            if isinstance(v, torch.Tensor):
                self.compare(place, text, name, tuple(v.shape), names)

    def compare(self, place, text, name, true, names):
        self.checked.add(place)
        try:
            said, open_ended = sizes(text, names)
        except Exception as error:
            self.errors.append(f"{place}: {text} of {name}: {error!r}")
            return
        tail = true[len(true) - len(said) :] if open_ended else true
        if said != tail:
            self.errors.append(
                f"{place}: {name} said {text} = {list(said)}, is {list(true)}"
            )

    def raise_errors(self):
        if self.errors:
            raise WrongShape("\n".join(dict.fromkeys(self.errors)))


class OneLayerCache:
    """Keys and values of all tokens so far."""

    def __init__(self):
        self.held = None

    @property
    def length(self):
        return 0 if self.held is None else self.held[0].shape[2]

    def update(self, k, v):
        if self.held is not None:
            k = torch.cat((self.held[0], k), dim=2)
            v = torch.cat((self.held[1], v), dim=2)
        self.held = k, v
        return k, v


def make_config(**changes):
    letter = LETTERS
    return LlamaConfig(
        vocab_size=letter["V"],
        hidden_size=letter["D"],
        intermediate_size=letter["I"],
        num_hidden_layers=letter["L"],
        num_attention_heads=letter["H"],
        num_key_value_heads=letter["K"],
        head_dim=letter["C"],
        rope_scaling=RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
        **changes,
    )


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, and PyTorch's lazy imports done before the trace."""
    monkeypatch.setattr(training, "tile_size", lambda *_: (*TILE.values(), 2))
    net = LlamaForCausalLM(make_config())
    ids = torch.zeros(1, 2, dtype=torch.long)
    net(ids, targets=ids).backward()


def fast_model(**changes):
    """Our model with both tricks of chapter 19 swapped in."""
    net = LlamaForCausalLM(make_config(**changes))
    return training.speed_up(net, device="cpu", dtype=torch.bfloat16)


def traced(run, own_first=False, modules=MODULES, **letters):
    """Trace `run()`, raise what is wrong, return the tracer."""
    letters = LETTERS | TILE | letters
    tracer = Tracer([m.__file__ for m in modules], letters, own_first)
    with tracer:
        run()
    tracer.raise_errors()
    return tracer


def a_text(T=LETTERS["T"]):
    torch.manual_seed(0)
    ids = torch.randint(0, LETTERS["V"], (LETTERS["B"], T + 1))
    return ids[:, :-1], ids[:, 1:]


def test_no_two_sizes_are_equal():
    letter = LETTERS | TILE | {"S": 34}
    del letter["L"]  # in no shape
    H, K, C, G, T = (letter[k] for k in "HKCGT")
    B = letter["B"]
    all_sizes = [*letter.values(), H * C, K * C, G * T, B * T, C // 2, 1]
    assert len(set(all_sizes)) == len(all_sizes)


@pytest.mark.parametrize("tied", [False, True])
def test_comments_of_a_training_step(tied):
    """Logits, loss and backward, and every module has a part in it."""
    ids, targets = a_text()
    net = LlamaForCausalLM(make_config(tie_word_embeddings=tied))

    def run():
        with torch.no_grad():
            net(ids)
        net(ids, targets=targets).backward()

    tracer = traced(run, S=ids.shape[1])
    for module in MODULES:
        lines = {p for p in tracer.checked if p.startswith(module.__file__)}
        assert len(lines) >= 3, module.__name__


@pytest.mark.parametrize("tied", [False, True])
def test_comments_of_a_fast_training_step(tied):
    """Blocks of 32 of 78 queries, each with a T and S of its own; tiles."""
    ids, targets = a_text(78)
    net = fast_model(tie_word_embeddings=tied)
    modules = (*MODULES, training)

    def run():
        net(ids)
        net(ids, targets=targets).backward()

    tracer = traced(run, own_first=True, modules=modules, T=78, S=78)
    lines = {p for p in tracer.checked if p.startswith(training.__file__)}
    assert len(lines) >= 20


def test_comments_of_the_fast_versions_with_a_mask():
    ids, _ = a_text(78)
    mask = torch.ones(1, 1, 78, 78, dtype=torch.bool).tril()
    net = fast_model()
    modules = (*MODULES, training)
    traced(
        lambda: net(ids, attention_mask=mask),
        own_first=True,
        modules=modules,
        T=78,
        S=78,
    )


def test_comments_with_a_cache():
    """T new tokens behind 8 that the cache holds: S = T + 8 keys."""
    ids, _ = a_text(34)
    net = LlamaForCausalLM(make_config())
    caches = [OneLayerCache() for _ in range(LETTERS["L"])]
    with torch.no_grad():
        net(ids[:, :8], cache=caches)
        traced(lambda: net(ids[:, 8:], cache=caches), S=34)


def test_comments_with_positions_and_a_mask():
    """Each row with positions of its own, and a mask."""
    ids, _ = a_text()
    B, T = ids.shape
    positions = torch.arange(T).expand(B, T)
    mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    net = LlamaForCausalLM(make_config())
    traced(lambda: net(ids, position_ids=positions, attention_mask=mask), S=T)


def planted(tmp_path, body):
    """Errors found in a module whose `forward(x)`, x [B, T, D], has `body`."""
    path = tmp_path / "planted.py"
    text = "import torch\n\n\ndef forward(x):\n"
    path.write_text(text + textwrap.indent(textwrap.dedent(body), " " * 4))
    linecache.checkcache()
    module = types.ModuleType("planted")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    tracer = Tracer([str(path)], LETTERS)
    x = torch.zeros(LETTERS["B"], LETTERS["T"], LETTERS["D"])
    with tracer:
        module.forward(x)
    return [Path(e).name for e in tracer.errors]


@pytest.mark.parametrize(
    "body, expected",
    [
        ("return x  # [B, T, D]", None),
        ("return x  # [B, D, T]", "return value said [B, D, T]"),
        ("return x  # [B, T, C]", "is [5, 26, 42]"),
        ("return x", "return value [5, 26, 42] has no shape comment"),
        ("y = x.mT  # [B, T, D]\nreturn y  # [B, D, T]", "planted.py:5: y"),
        ("y = x + 1\nreturn y  # [B, T, D]", "y [5, 26, 42] has no shape"),
        ("x += 1  # [B, T]\nreturn x  # [B, T, D]", "planted.py:5: x said"),
        ("y = (\n    x[0]\n)  # [B, D]\nreturn y  # [T, D]", "py:7: y said"),
        ("a, b = x, x[0]  # [B, T, D], [T, D]\nreturn 0", None),
        ("a, b = x, x[0]  # [B, T, D], [D, T]\nreturn 0", "b said [D, T]"),
        ("a, b = x, x[0]  # [B, T, D]\nreturn 0", "1 shapes for 2"),
        ("return x, x[0]  # [B, T, D], [T, T]", "said [T, T]"),
        ("return x, None, x[0]  # [B, T, D], [T, D]", None),
        ("return x, None, x[0]", "has no shape comment"),
        ("return x  # [..., T, D]", None),
        ("return x  # [..., D, T]", "said [..., D, T]"),
        ("return x  # [B, T, Q]", "NameError"),
        ("return x[..., 1:]  # [B, T, D-1]", None),
        ("for y in x:  # [D, T]\n    pass\nreturn 0", "y said [D, T]"),
        ("for y in x:  # [T, D]\n    z = y.sum()  # [T]\nreturn 0", "z said"),
        ("T = 7\nreturn x  # [B, T, D]", "T is 7 here"),
    ],
)
def test_a_wrong_comment_is_caught(tmp_path, body, expected):
    errors = planted(tmp_path, body)
    if expected is None:
        assert errors == []
    else:
        assert errors and expected in errors[0]
