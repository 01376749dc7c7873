"""Chapter 10: reading, cutting, scoring and comparing."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
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
from llama_tut.generate import pack_weights
from llama_tut.hellaswag import (
    Example,
    accuracy,
    body_and_head,
    clean,
    encode,
    make_example,
    mcnemar,
    pack,
    packed_length,
    packed_mask,
    read_examples,
    read_predictions,
    score,
    score_items,
    score_packed,
    score_rows,
    write_predictions,
)
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.files import InputError
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
DATA = Path(os.environ.get("LLAMA_TUT_DATA", ROOT / "../shared/data"))
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def enlarge(model):
    """Random weights large enough for tokens to matter to each other."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_items(count, low=1, high=9):
    """Contexts and endings of random ids and lengths."""
    generator = torch.Generator().manual_seed(1)

    def ids():
        n = torch.randint(low, high, (), generator=generator)
        return torch.randint(97, (n,), generator=generator).tolist()

    return [(ids(), [ids() for _ in range(4)]) for _ in range(count)]


def plain_sums(model, items):
    """The definition: one row at a time, no batch, no filling, no packing."""
    sums = []
    for context, endings in items:
        four = []
        for ending in endings:
            with torch.no_grad():
                out = model(torch.tensor([context + ending]))
            logp = getattr(out, "logits", out)[0].log_softmax(-1)
            start = len(context) - 1
            four.append(
                sum(logp[start + i, t].item() for i, t in enumerate(ending))
            )
        sums.append(four)
    return torch.tensor(sums)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_every_way_gives_the_sum_of_the_definition(tied, whose):
    if whose == "ours":
        config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = enlarge(LlamaForCausalLM(config))
    else:
        config = TheirConfig(**SIZES, tie_word_embeddings=tied)
        model = enlarge(TheirLlama(config))
    items = random_items(7)
    expected = plain_sums(model, items)
    rows = torch.tensor(score_rows(model, items))
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-3)
    parts = body_and_head(model)
    packed = torch.tensor(score_packed(*parts, items, rows_at_once=5))
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-3)


def test_ours_and_transformers_score_alike():
    theirs = enlarge(TheirLlama(TheirConfig(**SIZES, rms_norm_eps=1e-5)))
    ours = LlamaForCausalLM(LlamaConfig(**SIZES))
    ours.load_state_dict(theirs.state_dict())
    items = random_items(5)
    a, b = (
        torch.tensor(score_packed(*body_and_head(model), items))
        for model in (ours, theirs)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_another_architecture_takes_four_rows():
    config = GPT2Config(
        vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64
    )
    model = enlarge(GPT2LMHeadModel(config))
    assert body_and_head(model) is None
    items = random_items(5)
    examples = [Example(i, "c", tuple("abcd"), 0) for i in range(5)]
    found = score_items(model, examples, items)
    sums = torch.tensor([p["scores"] for p in found])
    expected = plain_sums(model, items)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-3)
    with pytest.raises(InputError, match="packed"):
        score_items(model, examples, items, packed=True)


def test_too_long_rows_lose_their_beginning():
    config = LlamaConfig(**(SIZES | {"max_position_embeddings": 12}))
    model = enlarge(LlamaForCausalLM(config))
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


def test_a_packed_row_by_hand():
    packed = pack([([5, 6], [[1, 2, 3], [4], [7, 8], [9]])])
    assert packed.ids.tolist() == [[5, 6, 1, 2, 7]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.parts.tolist() == [[0, 0, 1, 1, 3]]
    assert packed.rows.tolist() == [1, 2, 3, 1, 1, 4, 1]
    assert packed.targets.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert packed.owners.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert packed_mask(packed.parts)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


class Words:
    """A tokenizer: one token a word, told by its length."""

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
    model = enlarge(LlamaForCausalLM(LlamaConfig(**SIZES)))
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
        (GOOD | {"endings": "abcd"}, "line 2: endings is no list"),
        (GOOD | {"label": 4}, "line 2: label '4', not 0 to 3"),
        (GOOD | {"label": ""}, "line 2: label '', not 0 to 3"),
        (GOOD | {"ctx": 3}, "line 2: ctx is no text"),
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


def predictions(hits):
    return [
        {
            "index": i,
            "label": 1,
            "pred_sum": h,
            "pred_char": 1,
            "pred_token": 0,
        }
        for i, h in enumerate(hits)
    ]


def test_accuracy_and_its_error():
    a, error = accuracy(predictions([1] * 43 + [0] * 57))
    assert a == 0.43
    assert error == pytest.approx(math.sqrt(0.43 * 0.57 / 99))
    assert accuracy(predictions([1, 0]), "char") == (1.0, 0.0)
    assert accuracy(predictions([1]), "token") == (0.0, 0.0)


def test_mcnemar_by_hand():
    first = predictions([1, 1, 1, 1, 1, 0, 1, 0])
    second = predictions([0, 0, 0, 0, 0, 1, 1, 0])
    assert mcnemar(first, second) == (5, 1, 14 / 64)
    assert mcnemar(second, first) == (1, 5, 14 / 64)
    assert mcnemar(first, first) == (0, 0, 1.0)
    many = predictions([1] * 3000), predictions([0] * 1400 + [1] * 1600)
    assert mcnemar(*many)[2] < 1e-300
    with pytest.raises(InputError, match="differ in examples"):
        mcnemar(first, second[:-1])


def test_prediction_files(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [p | {"scores": [-1.5] * 4} for p in predictions([1, 0, 1])]
    write_predictions(file, rows)
    assert read_predictions(file) == rows
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(InputError, match="cannot be written"):
        write_predictions(tmp_path / "no" / "p.jsonl", rows)
    file.write_text('{"index": 0}\n')
    with pytest.raises(InputError, match="line 1: no label"):
        read_predictions(file)


# The harness, example for example


def agree(name, examples, lines, model, count=None):
    """Our predictions equal those that the harness made and we committed."""
    harness = json.loads((RESULTS / name).read_text())
    lines = lines[: harness["examples"]]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == harness["sha256_of_lines"], "made from another text"
    tokenizer = AutoTokenizer.from_pretrained(find_pretrained())
    answers = harness["answers"][:count]
    found = score(model, tokenizer, examples[: len(answers)])
    for ours, theirs in zip(found, answers, strict=True):
        for key in ("index", "label", "pred_sum", "pred_char"):
            assert ours[key] == theirs[key]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=2e-3)


def test_own_examples_as_the_harness():
    file = ROOT / "llama_tut/hellaswag_small.jsonl"
    lines = file.read_text().splitlines()
    model = load_pretrained().eval()
    agree("hellaswag_harness_small.json", read_examples(), lines, model)


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
    assert sum(map(packed_length, items)) == 1_637_687
    assert sum(len(e) for _, four in items for e in four) == 1_178_588


def test_published_examples_as_the_harness(published):
    file = published
    count = int(os.environ.get("LLAMA_TUT_HELLASWAG", 100))
    lines = file.read_text().splitlines()
    examples = read_examples(file, limit=200)
    model = pack_weights(load_pretrained().eval())
    name = "hellaswag_harness_first200.json"
    agree(name, examples, lines, model, count)


def test_transformers_model_scores_as_ours():
    folder = find_pretrained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples = read_examples(limit=6)
    a = score(load_pretrained(folder).eval(), tokenizer, examples)
    b = score(theirs, tokenizer, examples)
    for ours, other in zip(a, b, strict=True):
        assert ours["scores"] == pytest.approx(other["scores"], abs=1e-3)
        assert ours["pred_char"] == other["pred_char"]


def whole_set(name):
    """The committed predictions of all published examples."""
    folder = ROOT / "benchmarks" / "results"
    return read_predictions(folder / f"hellaswag_val_{name}.jsonl")


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
