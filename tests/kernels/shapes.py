"""What the ops of the head are tried with."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, D, V): tile aligned, every dimension odd, tiny, many vocabulary blocks, one token, no token.
SHAPES = [(32, 64, 128), (37, 53, 301), (2, 1, 3), (5, 16, 1000), (1, 33, 65), (0, 8, 16)]
