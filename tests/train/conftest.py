"""Each test is a process of its own as far as accelerate is concerned, and no test finds what
another one, or a user, has left in the cache.
"""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True, scope="session")
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group in which this process is alone: enough for models in shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
