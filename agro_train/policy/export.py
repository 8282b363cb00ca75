"""A checkpoint as a folder that transformers loads, whatever the run that wrote it was."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from agro_train import durable
from agro_train.config import TrainConfig
from agro_train.policy import adapter, checkpoint, shards
from agro_train.policy.load import load_model, load_tokenizer

FILE_SIZE = "2GB"  # of weights at most; one file's are in memory at a time
OURS = (checkpoint.STATE, checkpoint.OPTIMIZER, checkpoint.AHEAD)  # nothing to transformers


def export(source: Path, folder: Path, config: TrainConfig) -> None:
    """Writes a checkpoint's weights, configuration and tokenizer to a folder that is not there yet.

    Shards are put together, a file at a time; an adapter is merged into its base model, which is
    loaded for it, as `config` says. Killed in between, there is no folder of that name.
    """
    shutil.rmtree(durable.partial_of(folder), ignore_errors=True)  # of one that was killed
    with durable.writing_folder(folder) as partial:
        if (source / adapter.CONFIG).is_file():
            load_model(str(source), config).save_pretrained(partial)
            load_tokenizer(str(source)).save_pretrained(partial)
            return
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in OURS:
                shutil.copyfile(path, partial / path.name)
        if shards.are_in(source):
            _put_together(shards.stored(source / shards.FOLDER), partial)


def _put_together(weights: shards.Weights, folder: Path) -> None:
    split = split_torch_state_dict_into_shards(
        {
            name: torch.empty(stored.shape or (), dtype=stored.dtype, device="meta")
            for name, stored in weights.tensors.items()
        },
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=FILE_SIZE,
    )
    for file, names in split.filename_to_tensors.items():
        found = {name: weights.whole(name) for name in names}
        save_file(found, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
