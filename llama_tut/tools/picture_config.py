"""Pictures' options and config: what a run and a folder say about them."""

from dataclasses import dataclass
from pathlib import Path

from llama_tut.config import LlamaConfig, check_number, option
from llama_tut.tools.files import InputError, read_json, require, write_json

# What may be chosen


@dataclass(frozen=True)
class PictureOptions:
    """reading pictures (chapter 27)"""

    text_model: str = option(
        "", "model to which an encoder is added: a folder"
    )
    freeze_text: bool = option(False, "train the encoder and projector only")
    patch_size: int = option(4, "P, side of a patch in pixels")
    pixel_shuffle: int = option(1, "R, join R x R patches into one place")
    encoder_size: int = option(64, "E, width of the encoder")
    encoder_layers: int = option(2, "blocks of the encoder")
    encoder_heads: int = option(2, "heads of its attention")

    def __post_init__(self):
        names = "patch_size pixel_shuffle encoder_size encoder_layers"
        for name in (*names.split(), "encoder_heads"):
            flag = "--" + name.replace("_", "-")
            check_number(flag, getattr(self, name), whole=True)
        require(
            self.text_model or not self.freeze_text,
            "--freeze-text: give --text-model too",
        )


# A model that reads pictures

KIND = "llama_tut_pictures"  # model_type in config.json
PROCESSOR = "preprocessor_config.json"
SIZES = ("height", "width", "patch_size", "shuffle")


@dataclass(frozen=True)
class PictureConfig:
    """A text model, an encoder's blocks, and pictures of one size.

    Raises:
        InputError: the pictures cannot be cut into whole patches, or the
            text model has experts.
    """

    text: LlamaConfig
    encoder: LlamaConfig  #: its blocks; a vocabulary is not used
    height: int  #: H, of a picture in pixels
    width: int  #: W
    patch_size: int = 4  #: P, side of a patch
    shuffle: int = 1  #: R, side of a group that shares a place in the text

    def __post_init__(self):
        for name in SIZES:
            check_number(name, getattr(self, name), whole=True)
        require(
            type(self.text) is LlamaConfig,  # what its folder can say
            "--text-model must be a LLaMA with dense MLPs, without experts",
        )
        step = self.patch_size * self.shuffle
        require(
            self.height % step == 0 == self.width % step,
            f"{self.width} x {self.height} pixels: width and height must be "
            f"multiples of {step} (patches of {self.patch_size} pixels, joined "
            f"{self.shuffle} x {self.shuffle})",
        )

    @property
    def patches(self):
        """N: what the encoder computes with."""
        return self.height * self.width // self.patch_size**2

    @property
    def places(self):
        """N / R^2: what a picture takes in the text."""
        return self.patches // self.shuffle**2

    @property
    def placeholder(self):
        """The id that marks a place: V, one past the last of the text's."""
        return self.text.vocab_size

    def __getattr__(self, name):
        """What it does not know, it asks the text model's config."""
        if name.startswith("__") or name == "text":
            raise AttributeError(name)
        return getattr(self.text, name)

    def to_hf(self):
        """The dictionary of a config.json; its dtype is left to the writer."""
        sizes = {name: getattr(self, name) for name in SIZES}
        return {
            "architectures": ["PictureLlama"],
            "model_type": KIND,
            "image_token_id": self.placeholder,
            "text_config": self.text.to_hf(),
            "vision_config": self.encoder.to_hf() | sizes,
        }


def picture_flops(config):
    """FLOPs of encoder and projector for one picture, forward: N (2N_e + r).

    N_e: parameters in their matrices. r: what attention over N patches takes.
    """
    c, E, N = config, config.encoder.hidden_size, config.patches
    L, I = c.encoder.num_hidden_layers, c.encoder.intermediate_size
    width = c.encoder.num_attention_heads * c.encoder.head_dim
    kv = c.encoder.num_key_value_heads * c.encoder.head_dim
    block = 2 * E * (width + kv) + 3 * E * I
    ends = c.patch_size**2 * E + E * c.text.hidden_size
    return N * (2 * (L * block + ends) + 4 * L * N * width)


def write_processor(config, folder):
    """Write how a picture file becomes what the model reads."""
    size = {"height": config.height, "width": config.width}
    settings = {"size": size, "mode": "L", "ink_is_dark": True}
    write_json(Path(folder) / PROCESSOR, settings)


def read_picture_config(folder):
    """The `PictureConfig` of a model's folder.

    Raises:
        InputError: it holds another model, or no processor.
    """
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    require(
        hf.get("model_type") == KIND,
        f"{folder} holds a model of type {hf.get('model_type')!r}, which "
        "cannot see: name one that scripts/train.py --text-model made",
    )
    require(
        (folder / PROCESSOR).is_file(),
        f"{folder} lacks {PROCESSOR}, which says how a picture is read: copy "
        "it from the folder that training wrote",
    )
    size = read_json(folder / PROCESSOR).get("size")
    try:
        vision = hf["vision_config"]
        config = PictureConfig(
            LlamaConfig.from_hf(hf["text_config"]),
            LlamaConfig.from_hf(vision),
            **{name: vision[name] for name in SIZES},
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} is damaged: it lacks {error}"
        ) from error
    require(
        size == {"height": config.height, "width": config.width},
        f"{folder / PROCESSOR} has size {size}, but config.json pictures of "
        f"{config.width} x {config.height}",
    )
    return config
