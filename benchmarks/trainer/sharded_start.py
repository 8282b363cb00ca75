"""What a process needs of the host's memory to start a sharded run.

    python -m benchmarks.trainer.sharded_start [--ranks 2] [--out FILE]

Question: does every process hold its shards and no more while policy and reference come from the
disk, and what is it with the way that loads them whole?

Method. A Llama of random float32 weights is saved as safetensors files of 50 MB. The ranks (gloo,
on the CPU) load it as `agro train fsdp=true` does, policy and reference; before, each has made all
the imports, and loaded and sharded a model of a few kilobytes in the same way. The growth of the
peak since then (VmHWM, reset through /proc) is what is reported, and files' pages count in it.

One row of the CSV is one rank's start:

    way           shards: each rank reads its rows; whole: every rank loads the model, then shards
    rank
    ranks
    weights_mb    of the model, 1e6 bytes
    share_mb      of policy and reference together that one rank keeps
    layer_mb      the largest layer
    peak_mb       growth of the peak while they are loaded
    bound_mb      1.3 shares and a layer
    seconds
"""

import argparse
import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from agro_train import models
from agro_train.config import TrainConfig
from agro_train.policy import tiny
from agro_train.policy.load import Loaded, load_model
from agro_train.run import Models, Start
from benchmarks.measure import timing
from benchmarks.measure.arguments import add_numbers, parser_of
from benchmarks.measure.rows import RESULTS

WAYS = ("shards", "whole")
BYTES = 4  # of a weight


def config_of(layers: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def save_model(folder: Path, layers: int, hidden: int) -> tuple[float, float]:
    """Returns the size of its weights and of its largest layer, 1e6 bytes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(layers, hidden))
    model.save_pretrained(folder, max_shard_size="50MB")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    embeddings = model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    return BYTES * total / 1e6, BYTES * max(layer, embeddings) / 1e6


def load(folder: Path, way: str, accelerator: Accelerator) -> Models:
    """Policy and reference of a sharded run on the model in a folder."""
    config = TrainConfig(model=str(folder), fsdp=True)
    whole = patch.object(models, "load_unread", lambda *given: Loaded(load_model(*given[:2])))
    with whole if way == "whole" else nullcontext():
        loaded, _ = models.load_models(
            config, str(folder), tiny.build_tokenizer(), Start(), accelerator
        )
    return loaded


def be_a_rank(folder: Path, way: str) -> None:
    """Writes FOLDER/WAY-RANK.json."""
    accelerator = Accelerator(cpu=True)
    load(folder / "small", way, accelerator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before, began = timing.high_water_bytes(), time.perf_counter()
    loaded = load(folder / "large", way, accelerator)
    grown, seconds = timing.high_water_bytes() - before, time.perf_counter() - began
    found = {"peak_mb": grown / 1e6, "seconds": seconds}
    assert loaded.num_weights, "the model is there until it has been measured"
    path = folder / f"{way}-{accelerator.process_index}.json"
    path.write_text(json.dumps(found))
    accelerator.end_training()


def measure(folder: Path, ranks: int, layers: int, hidden: int) -> list[dict[str, object]]:
    save_model(folder / "small", 1, 64)
    weights, layer = save_model(folder / "large", layers, hidden)
    share = 2 * weights / ranks
    command = [sys.executable, "-m", "benchmarks.trainer.sharded_start"]
    rows = []
    for way in WAYS:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"OMP_NUM_THREADS": 1}
        processes = [
            subprocess.Popen(
                [*command, "--rank-in", str(folder), "--way", way],
                env={
                    **os.environ,
                    **{name: str(value) for name, value in place.items()},
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                },
            )
            for rank in range(ranks)
        ]
        assert not any(process.wait() for process in processes), "a rank has failed"
        for rank in range(ranks):
            found = json.loads((folder / f"{way}-{rank}.json").read_text())
            row = {"way": way, "rank": rank, "ranks": ranks, "weights_mb": weights}
            row |= {"share_mb": share, "layer_mb": layer, "peak_mb": found["peak_mb"]}
            rows.append(row | {"bound_mb": 1.3 * share + layer, "seconds": found["seconds"]})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add_numbers(parser, ranks=2, layers=12, hidden=512)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_sharded_start.csv")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_in is not None:
        be_a_rank(options.rank_in, options.way)
        return 0
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), options.ranks, options.layers, options.hidden)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
