"""What the tests of the kernels share: small tiles, and which Triton can interpret the kernels."""

import importlib.metadata
from collections.abc import Iterator

import pytest
import torch

from agro_kernels._torch import linear_logprobs as blocked
from tests.conftest import SetSizes
from tests.kernels.isas import ISAS, chosen


@pytest.fixture
def small_tiles(set_sizes: SetSizes) -> None:
    """The blocked torch path with 16 tokens by 64 vocabulary entries at a time.

    Small shapes then cross several tiles.
    """
    set_sizes(blocked, TOKEN_CHUNK=16, VOCAB_BLOCK=64)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every available instruction set in turn."""
    with chosen(request.param):
        yield request.param


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """torch.empty is filled with NaN: what is read and no kernel has written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton 3.5 compiles the kernels, but its interpreter cannot run them on CPU tensors.

    It counts the strides of a tensor descriptor in elements where it means bytes, and takes NumPy
    arrays for scalars, which NumPy 2.4 refuses.
    """
    if torch.cuda.is_available() or not triton_version().startswith("3.5."):
        return
    skip = pytest.mark.skip(reason="Triton 3.5's interpreter cannot run the kernels")
    for item in items:
        if "test_triton_" in item.nodeid:
            item.add_marker(skip)


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
