"""Tensors of all ranks in one folder, by torch.distributed.checkpoint.

Each rank writes a safetensors file; a tensor that is cut lies there in pieces
with their offsets, so any number of ranks can read it. What several ranks
hold is written once.
"""

import warnings
from contextlib import contextmanager

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)


@contextmanager
def one_kind_of_error():
    """What goes wrong on a disk, on any rank, is an OSError."""
    try:
        with warnings.catch_warnings():  # that one process is alone
            warnings.simplefilter("ignore")
            yield
    except (SafetensorError, CheckpointException) as error:
        first = error
        if isinstance(error, CheckpointException):
            first = next(iter(error.failures.values()))[0]
        if isinstance(first, OSError):
            raise first from error
        raise OSError(str(first).split(": ")[-1]) from error


def write_tensors(folder, tensors, ranks):
    """Write what this rank holds of {name: tensor}; all ranks call it.

    Raises: OSError, on all ranks, when one of them cannot write.
    """
    with one_kind_of_error():
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(
                folder, save_distributed=True
            ),
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=ranks.gloo_group,
            no_dist=ranks.world_size == 1,
        )


def read_tensors(folder, tensors, ranks):
    """Fill {name: tensor} in place with what was written; all ranks call it.

    Raises: OSError, on all ranks, when one of them cannot read.
    """
    with one_kind_of_error():
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(folder),
            process_group=ranks.gloo_group,
            no_dist=ranks.world_size == 1,
        )


def tensor_shapes(folder):
    """{name: shape} of what was written; only the files' headers are read."""
    about = HuggingFaceStorageReader(folder).read_metadata()
    found = about.state_dict_metadata
    return {name: list(tensor.size) for name, tensor in found.items()}
