"""Settings every test shares: where Triton runs, how many threads, and no word to the network."""

import os

import torch

# Triton decides at import time whether a kernel is interpreted, so this precedes every import of
# it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

torch.set_num_threads(min(2, os.cpu_count() or 1))
