"""Every provider by its name in tables and on the command line."""

from benchmarks.head.providers.base import Provider
from benchmarks.head.providers.cce import CutCrossEntropy, CutCrossEntropyCompiled
from benchmarks.head.providers.liger import LigerChunked, LigerScaled
from benchmarks.head.providers.ours import (
    Ours,
    OursKeepingAll,
    OursKeepingHalf,
    OursKeepingMost,
    OursKeepingQuarter,
)
from benchmarks.head.providers.plain_torch import (
    CompiledCheckpoint,
    CompiledTorch,
    PlainTorch,
    TorchLinearCrossEntropy,
    TorchLinearCrossEntropyTuned,
)
from benchmarks.head.providers.quack import Quack
from benchmarks.head.providers.trl import TrlChunked, TrlSelective

PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        Ours,
        OursKeepingQuarter,
        OursKeepingHalf,
        OursKeepingMost,
        OursKeepingAll,
        PlainTorch,
        CompiledTorch,
        CompiledCheckpoint,
        TorchLinearCrossEntropy,
        TorchLinearCrossEntropyTuned,
        TrlSelective,
        TrlChunked,
        LigerChunked,
        LigerScaled,
        Quack,
        CutCrossEntropy,
        CutCrossEntropyCompiled,
    )
}
