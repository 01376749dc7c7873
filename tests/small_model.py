"""Small random models, with and without a tokenizer; calls of scripts in this process."""

import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools import cli
from llama_tut.weights import load_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def byte_tokenizer():
    """256 bytes and an end of text: a tokenizer that needs no training."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def save_small_model(folder):
    """Write a Hugging Face folder with a model of two blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    save_pretrained(model, folder, byte_tokenizer())
    return folder


def damage(folder, out):
    """A copy of a model's folder whose last norm is NaN."""
    shutil.copytree(folder, out)
    model = load_pretrained(out)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    save_file(model.state_dict(), out / "model.safetensors", {"format": "pt"})
    return out


def caller(name, monkeypatch, capsys, *always):
    """A function that calls scripts/NAME.py: (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = __import__(name)

    def call(*options):
        argv = [f"{name}.py", *map(str, [*always, *options])]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            cli.run(script.main)
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


def refused(result, *words):
    """Exit code 2, one line on stderr with these words, nothing else."""
    code, out, err = result
    assert code == 2 and out == "", result
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


def special_tokenizer(before, after):
    """Bytes as tokens; `before` and `after` stand around every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *letters[:-1]]  # 257, as the small model has
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    )


def enlarge(model):
    """Random weights large enough for tokens to matter to each other."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_model(**changes):
    """A LLaMA of three blocks whose tokens matter to each other."""
    return enlarge(LlamaForCausalLM(LlamaConfig(**(SIZES | changes))))


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


def predictions(hits):
    """Predictions by sum that are right where `hits` has a 1."""
    return [
        dict(index=i, label=1, pred_sum=hit, pred_char=1, pred_token=0)
        for i, hit in enumerate(hits)
    ]
