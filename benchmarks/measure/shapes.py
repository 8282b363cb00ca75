"""The only table of shapes: which lm_heads are measured, and with how many tokens.

Letters: N tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """An lm_head: weight (vocabulary, hidden_size), and its softcap where the model has one."""

    name: str
    hidden_size: int  # D
    vocabulary: int  # V
    softcap: float | None = None


@dataclass(frozen=True)
class Shape:
    """A head and a number of tokens. `name` is what tables and plots call it."""

    name: str
    tokens: int  # N
    head: Head

    def gemm_flop(self) -> int:
        """Floating-point operations of one product of (N, D) and (D, V): 2 N D V."""
        return 2 * self.tokens * self.head.hidden_size * self.head.vocabulary


# From each model's published config.json: hidden_size, vocab_size, final_logit_softcapping.
HEADS = {
    head.name: head
    for head in (
        Head("smollm2-135m", 576, 49152),
        Head("smollm2-360m", 960, 49152),
        Head("smollm2-1.7b", 2048, 49152),
        Head("llama3-1b", 2048, 128256),
        Head("llama3-3b", 3072, 128256),
        Head("llama3-8b", 4096, 128256),
        Head("qwen2.5-0.5b", 896, 151936),
        Head("qwen2.5-1.5b", 1536, 151936),
        Head("qwen2.5-3b", 2048, 151936),
        Head("qwen2.5-7b", 3584, 152064),
        Head("qwen3-0.6b", 1024, 151936),
        Head("qwen3-1.7b", 2048, 151936),
        Head("qwen3-4b", 2560, 151936),
        Head("qwen3-8b", 4096, 151936),
        Head("gemma2-2b", 2304, 256000, softcap=30.0),
        Head("gemma2-9b", 3584, 256000, softcap=30.0),
        Head("gemma3-1b", 1152, 262144),
        Head("gemma3-4b", 2560, 262208),
        Head("gemma3-12b", 3840, 262208),
    )
}

# A CPU sees a small model with many tokens, and large heads with few.
CPU_SHAPES = {
    "A": Shape("A", 2048, HEADS["smollm2-135m"]),
    "B": Shape("B", 1024, HEADS["llama3-1b"]),
    "C": Shape("C", 512, HEADS["llama3-8b"]),
}

# Tokens of a micro-batch on a GPU, 1k to 128k.
GPU_TOKENS = (1024, 4096, 16384, 65536, 131072)
GPU_HEADS = ("llama3-1b", "llama3-8b", "qwen3-8b", "gemma2-9b", "gemma3-4b")

# Small enough for float64 on any machine: every provider's errors are measured on it.
ACCURACY_SHAPE = Shape("accuracy", 256, Head("accuracy", 576, 8192))

# For --smoke, which runs a benchmark's code in seconds. No dimension is a multiple of a tile.
SMOKE_SHAPE = Shape("smoke", 37, Head("smoke", 40, 523))
SMOKE_SOFTCAP_SHAPE = Shape("smoke-softcap", 37, Head("smoke-softcap", 40, 523, softcap=30.0))
