"""Pictures read by a small text model: digits and words, with what each control says.

    python benchmarks/pictures.py [--work runs/pictures]

A text model of half a million parameters is trained on Python's reference,
as in chapter 27 but for 80 steps, one for each seed. Then an encoder is added and
trained on pairs of handwritten digits, three times: with the text model
learning too, with the text model frozen, and with random weights in its place.
Words in printed fonts are read with the first kind. Stop it with Ctrl-C; the
same command goes on. Writes benchmarks/results/pictures.json.
"""

import pydoc_data.topics
from pathlib import Path

import torch

from llama_tut.generate import generate
from llama_tut.multimodal import (
    PictureLoader,
    build_picture_loader,
    build_pictures,
    load_pictures,
    read,
    save_pictures,
)
from llama_tut.pretraining import train
from llama_tut.tools import cli
from llama_tut.tools.files import read_json, write_json
from llama_tut.tools.machine import write_result
from llama_tut.tools.options import configure
from llama_tut.tools.picture_config import PictureOptions
from llama_tut.tools.pictures import prepare_pictures
from llama_tut.tools.prepare import prepare
from llama_tut.tools.printed_words import GROUPS
from llama_tut.tools.tokenizers import read_tokenizer

SEEDS = (1, 2, 3)
TEXT = {
    "steps": 80,
    "micro_batch_size": 8,
    "optimizer": "muon",
    "learning_rate": 8e-3,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "samples": 0,
}
DIGITS = {
    "steps": 600,
    "sequence_length": 16,
    "micro_batch_size": 32,
    "tokens_per_step": 512,
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "final_fraction": 0.02,
    "samples": 0,
}
WORDS = DIGITS | {
    "steps": 3000,
    "sequence_length": 24,
    "tokens_per_step": 768,
    "pixel_shuffle": 2,
    "encoder_size": 96,
    "encoder_layers": 2,
}
KINDS = {
    "digits": DIGITS,
    "digits, text model frozen": DIGITS | {"freeze_text": True},
    "digits, random text model": DIGITS,
    "words": WORDS,
}
PLAN = [  # words on two seeds
    (kind, seed)
    for seed in SEEDS
    for kind in KINDS
    if kind != "words" or seed < 3
]


def text_model(work, seed, steps):
    """The folder of a text model; with one step it has learned nothing."""
    source, data = work / "topics.txt", work / "text"
    topics = pydoc_data.topics.topics
    source.write_text("\n\n".join(topics.values()))
    prepare([source], data, 1, vocab_size=1024)
    out = work / f"text_{steps}_{seed}"
    if not (out / "model").is_dir():
        rate = TEXT["learning_rate"] if steps > 1 else 0.0
        own = {"steps": steps, "learning_rate": rate, "seed": seed}
        options = TEXT | own | {"data": str(data), "out": str(out)}
        train(configure(options))
    return out / "model"


def run(work, kind, seed):
    """Train one model and measure it -> a dictionary for the result file."""
    corpus, name = kind.split(",")[0], kind.replace(",", "").replace(" ", "_")
    text = text_model(work, seed, 1 if "random" in kind else TEXT["steps"])
    data, out = work / corpus, work / f"{name}_{seed}"
    info = prepare_pictures(corpus, text, data)
    options = KINDS[kind] | {
        "data": str(data), "out": str(out), "seed": seed,
        "text_model": str(text), "resume": out.exists(),
    }  # fmt: skip
    config = configure(options, [PictureOptions])
    last = train(
        config,
        build_pictures,
        build_loader=build_picture_loader,
        save_model=save_pictures,
    )
    return {
        "kind": kind,
        "seed": seed,
        "train_loss": last["loss"],
        "val_loss": last["val_loss"],
        **measure(load_pictures(out / "model"), data, info, config),
    }


def measure(model, data, info, config):
    """Accuracies with the right pictures and with the wrong ones."""
    loader = PictureLoader(
        data, "val", 1, config.sequence_length, shuffle=False,
        config=model.config, end=info.end_of_text,
    )  # fmt: skip
    tokenizer, end = read_tokenizer(data / "tokenizer"), info.end_of_text
    pictures, texts = loader.pictures, loader.texts

    def texts_in(shown):
        parts = [read(model, part, end) for part in shown.split(200)]
        return [tokenizer.decode(ids) for part in parts for ids in part]

    def right(found):
        return [a == b for a, b in zip(found, texts, strict=True)]

    order = torch.randperm(
        len(texts), generator=torch.Generator().manual_seed(0)
    )
    alone = generate(model.text, torch.tensor([[end]]), 16, stop_tokens=[end])
    alone = tokenizer.decode(alone[0, 1:].tolist())
    said = {
        "real": texts_in(pictures),
        "shuffled": texts_in(pictures[order]),
        "blank": texts_in(torch.zeros_like(pictures)),
        "text alone": [alone] * len(texts),
    }
    found = {"count": len(texts)}
    for name, answers in said.items():
        found[name] = sum(right(answers)) / len(texts)
    real = right(said["real"])
    if max(loader.groups):
        found["groups"] = {
            name: sum(
                hit
                for hit, own in zip(real, loader.groups, strict=True)
                if own == number
            )
            / sum(loader.groups == number).item()
            for number, (name, *_) in enumerate(GROUPS)
        }
        found["said"] = said["real"]
    return found


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default="runs/pictures", metavar="DIR")
    work = Path(parser.parse_args().work)
    work.mkdir(parents=True, exist_ok=True)
    done = {}
    for kind, seed in PLAN:
        path = work / f"{kind.replace(',', '').replace(' ', '_')}_{seed}.json"
        if not path.exists():
            write_json(path, run(work, kind, seed))
        done[kind, seed] = read_json(path)
        print({k: v for k, v in done[kind, seed].items() if k != "said"})
        runs = list(done.values())
        write_result("pictures", {"options": KINDS, "runs": runs})


if __name__ == "__main__":
    cli.run(main)
