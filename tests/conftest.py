"""Settings every test shares: the seed, where Triton runs, how many threads, and no network."""

import os
import random

import pytest
import torch

# Triton decides at import time whether a kernel is interpreted, so this precedes every import of
# it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers whichever tests have run before it."""
    random.seed(0)
    torch.manual_seed(0)
