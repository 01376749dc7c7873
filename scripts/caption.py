"""Say what a picture shows, with a model that scripts/train.py --text-model made.

python scripts/caption.py --model runs/digits/model --image PICTURE.png
"""

from pathlib import Path

import torch
from models import DTYPES, find_device

from llama_tut.multimodal import load_pictures, read
from llama_tut.tools.cli import Parser, run
from llama_tut.tools.files import require
from llama_tut.tools.picture_config import read_picture_config
from llama_tut.tools.pictures import read_picture
from llama_tut.tools.pretrained import refuse_run
from llama_tut.tools.tokenizers import read_tokenizer, separator_id


def build_parser():
    """The command line's parser."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="RUN/model")
    add(
        "--image",
        required=True,
        nargs="+",
        metavar="FILE",
        help="pictures, dark ink on white paper",
    )
    add("--dtype", choices=DTYPES, default="stored", help="of the weights")
    add("--device", default="cpu", help="cpu, cuda, mps ...")
    add("--max-new-tokens", type=int, help="None: 30, or what fits")
    return parser


def main():
    args = build_parser().parse_args()
    new = args.max_new_tokens
    require(new is None or new >= 1, "--max-new-tokens must be 1 or more")
    device = find_device(args.device)
    folder = Path(args.model).expanduser()
    refuse_run(folder)
    require(folder.is_dir(), f"there is no folder {folder}")
    config = read_picture_config(folder)
    height, width = config.height, config.width
    pictures = [read_picture(file, height, width) for file in args.image]
    tokenizer = read_tokenizer(folder)
    dtype = DTYPES[args.dtype]
    model = load_pictures(folder, dtype).to(device)
    shown = torch.stack(pictures).to(device, model.text.output_weight.dtype)
    end = separator_id(folder, tokenizer)
    room = config.text.max_position_embeddings - 1 - config.places
    answers = read(model, shown, end, new or max(1, min(30, room)))
    for file, ids in zip(args.image, answers, strict=True):
        text = tokenizer.decode(ids)
        one = len(args.image) == 1
        print(text.strip() if one else f"{file}: {text.strip()}")


if __name__ == "__main__":
    run(main)
