"""Chapter 10: reading, cutting, scoring and comparing."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from small_model import (
    SIZES,
    enlarge,
    plain_sums,
    predictions,
    random_items,
    random_model,
    special_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers import LlamaConfig as TheirConfig
from transformers import (
    LlamaForCausalLM as TheirLlama,
)

from llama_tut.config import LlamaConfig
from llama_tut.fast.generation import pack_weights
from llama_tut.fast.scoring import score_packed
from llama_tut.hellaswag import (
    Example,
    accuracy,
    clean,
    encode,
    make_example,
    read_examples,
    score,
    score_items,
    score_rows,
)
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.files import InputError
from llama_tut.tools.predictions import read_predictions
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.tools.statistics import mcnemar
from llama_tut.weights import load_pretrained

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
DATA = Path(os.environ.get("LLAMA_TUT_DATA", ROOT / "../shared/data"))


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_rows_give_the_sum_of_the_definition(whose):
    if whose == "ours":
        model = random_model()
    else:
        model = enlarge(TheirLlama(TheirConfig(**SIZES)))
    items = random_items(7)
    rows = torch.tensor(score_rows(model, items))
    expected = plain_sums(model, items)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-3)


def test_every_causal_model_can_be_scored():
    config = GPT2Config(
        vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64
    )
    model = enlarge(GPT2LMHeadModel(config))
    items = random_items(5)
    examples = [Example(i, "c", tuple("abcd"), 0) for i in range(5)]
    found = score_items(model, examples, items)
    sums = torch.tensor([p["scores"] for p in found])
    expected = plain_sums(model, items)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("score_batch", [score_rows, score_packed])
def test_what_a_model_cannot_score_is_refused(score_batch):
    model = random_model()
    examples = [Example(0, "c", tuple("abcd"), 0)]

    def refuse(message, context, *endings):
        with pytest.raises(InputError, match=message):
            items = [(context, list(endings))]
            score_items(model, examples, items, score_batch=score_batch)

    refuse("token 97, the model only 97", [97], [1], [2], [3], [4])
    refuse("token 99", [1], [1], [2], [3, 99], [4])
    refuse("no token of its own", [1], [1], [2], [], [4])
    refuse("an ending has 65 tokens", [1], [1] * 65, [2], [3], [4])
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    refuse("logits are not finite", [1], [1], [2], [3], [4])


def test_too_long_rows_lose_their_beginning():
    model = random_model(max_position_embeddings=12)
    items = random_items(9, low=3, high=12)
    assert any(len(c) + len(e) - 1 > 12 for c, four in items for e in four)
    examples = [Example(i, "c", tuple("abcd"), 0) for i in range(9)]
    found = score_items(model, examples, items, batch_size=2)
    cut = [[(c + e)[-13:][: -len(e)] for e in endings] for c, endings in items]
    for prediction, contexts, (_, endings) in zip(
        found, cut, items, strict=True
    ):
        for s, c, e in zip(
            prediction["scores"], contexts, endings, strict=True
        ):
            [[expected]] = plain_sums(model, [(c, [e])]).tolist()
            assert abs(s - expected) < 1e-3


class Words:
    """A tokenizer: one token per word, told by its length."""

    bos_token_id, eos_token_id = None, 96

    def __call__(self, text, add_special_tokens=True):
        one = isinstance(text, str)
        ids = [[len(w) for w in t.split()] for t in ([text] if one else text)]
        return type("Encoding", (), {"input_ids": ids[0] if one else ids})


def test_three_scores_may_give_three_predictions():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    example = Example(0, "a", ("aaaa", "bb cc dd", "e", "f"), 1)
    items = [([1], [[2], [3, 4, 5], [6], [7]])]
    [found] = score_items(model, [example], items)
    a, b, c, d = found["scores"]
    assert found["pred_sum"] == [a, b, c, d].index(max(a, b, c, d))
    chars = [a / 4, b / 8, c, d]
    assert found["pred_char"] == chars.index(max(chars))
    tokens = [a, b / 3, c, d]
    assert found["pred_token"] == tokens.index(max(tokens))


def test_predictions_come_in_the_order_of_the_examples():
    model = random_model()
    texts = ["a", "bb bb bb", "ccc", "dd d d d"]
    examples = [
        Example(i, t, ("x", "xx", "yyy y", "z zz"), 0)
        for i, t in enumerate(texts)
    ]
    together = score(model, Words(), examples, batch_size=3)
    assert [p["index"] for p in together] == [0, 1, 2, 3]
    for prediction, example in zip(together, examples, strict=True):
        [alone] = score(model, Words(), [example])
        assert prediction["scores"] == pytest.approx(alone["scores"], abs=1e-4)


def test_an_empty_context_is_one_special_token():
    context, endings = encode(Words(), Example(0, "", ("a", "b c") * 2, 0))
    assert context == [96]
    assert endings == [[1], [1, 1]] * 2
    nothing = Words()
    nothing.eos_token_id = None
    with pytest.raises(InputError, match="special token"):
        encode(nothing, Example(0, "", tuple("abcd"), 0))


@pytest.mark.parametrize("before", [[], ["<s>"]])
@pytest.mark.parametrize("after", [[], ["</s>"]])
def test_an_end_of_text_is_never_part_of_an_example(before, after):
    """Some tokenizers are saved so that they end every text."""
    tokenizer = special_tokenizer(before, after)
    example = Example(0, "He cooks.", ("He eats.", "No", "c", "d"), 0)
    context, endings = encode(tokenizer, example)
    assert tokenizer.convert_ids_to_tokens(context) == [
        *before,
        *"HeĠcooks.",
    ]
    assert tokenizer.decode(endings[0]) == " He eats."
    assert tokenizer.decode(endings[1]) == " No"


# Text


def test_clean_does_what_the_harness_does():
    assert clean(" [header] How to x [title] Do y. ") == " How to x. Do y."
    assert clean("a [step] b  c") == "a b c"
    record = {
        "activity_label": "Baking",
        "ctx_a": "He mixes.",
        "ctx_b": "the Baker",
        "ctx": "not used",
        "endings": ["a", "b", "c", "d"],
        "label": "2",
    }
    example = make_example(7, record)
    assert example.context == "Baking: He mixes. The baker"
    assert (example.index, example.label) == (7, 2)


def test_the_own_examples_are_sound():
    examples = read_examples()
    assert len(examples) >= 40
    assert len({e.context for e in examples}) == len(examples)
    for example in examples:
        assert len(set(example.endings)) == 4
        assert all(e.endswith(".") for e in example.endings)
    labels = [e.label for e in examples]
    assert all(labels.count(i) == len(labels) // 4 for i in range(4))
    for pick in (min, max):  # length alone must not give the answer away
        hits = [
            e.endings.index(pick(e.endings, key=len)) == e.label
            for e in examples
        ]
        assert 0.1 < sum(hits) / len(hits) < 0.35


GOOD = {"activity_label": "a", "ctx": "b", "endings": list("wxyz"), "label": 0}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: no JSON object"),
        (GOOD | {"endings": ["a", "b", "c"]}, "line 2: 3 endings, must be 4"),
        (GOOD | {"endings": ["a", "b", "c", ""]}, "line 2: an empty ending"),
        (GOOD | {"endings": ["a", "b", "c", "  "]}, "an empty ending"),
        (GOOD | {"endings": ["a", "b", "c", "[header]"]}, "an empty ending"),
        (GOOD | {"endings": ["a", "b", "c", 4]}, "an ending is not a string"),
        ("[" * 100_000, "line 2: not JSON"),
        (GOOD | {"endings": "abcd"}, "line 2: endings is not a list"),
        (GOOD | {"label": 4}, "line 2: label '4', not 0 to 3"),
        (GOOD | {"label": ""}, "line 2: label '', not 0 to 3"),
        (GOOD | {"ctx": 3}, "line 2: ctx is not a string"),
        ({"ctx": "b", "label": 0}, "line 2: activity_label, endings missing"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    file.write_text(json.dumps(GOOD) + "\n" + text + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_examples(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(read_examples(file, limit=1)) == 1


def test_lines_end_at_line_feeds_only(tmp_path):
    """JSON may hold other line ends; half a surrogate pair is replaced."""
    file = tmp_path / "odd.jsonl"
    texts = ["eats\u2028now", "he said\x85 no", "\x0b\x1c b", "c"]
    line = json.dumps(GOOD | {"endings": texts}, ensure_ascii=False)
    half = json.dumps(GOOD | {"ctx": "a \ud83d b", "endings": list("wxyz")})
    file.write_bytes(f"\ufeff{line}\r\n\n{half}".encode())
    first, second = read_examples(file)
    assert first.endings[:2] == tuple(texts[:2])
    assert second.context == "a: a ? b"


def test_bad_files_are_named(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (empty, binary, tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InputError, match=file.name):
            read_examples(file)
    with pytest.raises(InputError, match="limit"):
        read_examples(limit=0)


# Statistics


def test_accuracy_and_its_error():
    a, error = accuracy(predictions([1] * 43 + [0] * 57))
    assert a == 0.43
    assert error == pytest.approx(math.sqrt(0.43 * 0.57 / 99))
    assert accuracy(predictions([1, 0]), "char") == (1.0, 0.0)
    assert accuracy(predictions([1]), "token") == (0.0, 0.0)


# The harness, example for example


def agree(name, examples, lines, model, count=None, score_batch=score_rows):
    """Our predictions equal those that the harness made and we committed."""
    harness = json.loads((RESULTS / name).read_text())
    lines = lines[: harness["examples"]]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == harness["sha256_of_lines"], "made from another text"
    tokenizer = AutoTokenizer.from_pretrained(find_pretrained())
    answers = harness["answers"][:count]
    examples = examples[: len(answers)]
    found = score(model, tokenizer, examples, score_batch=score_batch)
    for ours, theirs in zip(found, answers, strict=True):
        for key in ("index", "label", "pred_sum", "pred_char"):
            assert ours[key] == theirs[key]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=2e-3)


def test_own_examples_as_the_harness():
    """The plain way: a few, as in the chapter; the fast way: all of them."""
    lines = (ROOT / "llama_tut/hellaswag_small.jsonl").read_text().splitlines()
    name, model = "hellaswag_harness_small.json", load_pretrained().eval()
    agree(name, read_examples(), lines, model, count=6)
    packed = pack_weights(model)
    agree(name, read_examples(), lines, packed, score_batch=score_packed)


@pytest.fixture
def published():
    file = DATA / "hellaswag_val.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}: set LLAMA_TUT_DATA to the folder that has it")
    return file


def test_the_published_set_is_as_the_chapter_says(published):
    examples = read_examples(published)
    assert len(examples) == 10_042
    for pick, expected in ((max, 0.241), (min, 0.254)):
        hits = [
            e.endings.index(pick(e.endings, key=len)) == e.label
            for e in examples
        ]
        assert sum(hits) / len(hits) == pytest.approx(expected, abs=5e-4)
    tokenizer = AutoTokenizer.from_pretrained(find_pretrained())
    items = [encode(tokenizer, example) for example in examples]
    rows = sum(len(c) + len(e) - 1 for c, four in items for e in four)
    assert rows == 3_135_488
    packed = [len(c) + sum(len(e) - 1 for e in four) for c, four in items]
    assert sum(packed) == 1_637_687
    assert sum(len(e) for _, four in items for e in four) == 1_178_588


def test_published_examples_as_the_harness(published):
    file = published
    count = int(os.environ.get("LLAMA_TUT_HELLASWAG", 40))
    lines = file.read_text().split("\n")
    examples = read_examples(file, limit=200)
    model = pack_weights(load_pretrained().eval())
    name = "hellaswag_harness_first200.json"
    agree(name, examples, lines, model, count, score_packed)


def test_transformers_model_scores_as_ours():
    folder = find_pretrained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples = read_examples(limit=3)
    a = score(load_pretrained(folder).eval(), tokenizer, examples)
    b = score(theirs, tokenizer, examples)
    for ours, other in zip(a, b, strict=True):
        assert ours["scores"] == pytest.approx(other["scores"], abs=1e-3)
        assert ours["pred_char"] == other["pred_char"]


def whole_set(name):
    """The committed predictions of all published examples."""
    folder = ROOT / "benchmarks" / "results"
    return read_predictions(folder / f"hellaswag_val_{name}.jsonl.gz")


def test_the_whole_set_is_predicted_as_by_transformers():
    ours, theirs = whole_set("llama_tut"), whole_set("transformers")
    assert [p["index"] for p in ours] == list(range(10_042))
    for kind in ("sum", "char", "token"):
        assert mcnemar(ours, theirs, kind) == (0, 0, 1.0)
        key = f"pred_{kind}"
        assert [p[key] for p in ours] == [p[key] for p in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=2e-2)


def test_the_whole_set_belongs_to_the_published_file(published):
    labels = [(e.index, e.label) for e in read_examples(published)]
    for name in ("llama_tut", "transformers"):
        assert [(p["index"], p["label"]) for p in whole_set(name)] == labels


def test_the_whole_set_is_what_the_harness_says(published):
    file = ROOT / "benchmarks/results/hellaswag_harness_first200.json"
    answers = json.loads(file.read_text())["answers"]
    for ours, theirs in zip(whole_set("llama_tut"), answers, strict=False):
        assert ours["label"] == theirs["label"]
        assert ours["pred_sum"] == theirs["pred_sum"]
        assert ours["pred_char"] == theirs["pred_char"]
