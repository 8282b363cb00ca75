"""What the tests of the kernels share: tiles so small that small shapes cross several of them."""

import pytest

from agro_kernels._torch import linear_logprobs as blocked


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocked torch path with 16 tokens by 64 vocabulary entries at a time."""
    monkeypatch.setattr(blocked, "TOKEN_CHUNK", 16)
    monkeypatch.setattr(blocked, "VOCAB_BLOCK", 64)
