"""Each test is a process of its own as far as accelerate is concerned, and no test finds what
another one, or a user, has left in the cache.
"""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState

from tests.train.forked import Server


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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Runs of this process draw no curves, which takes longer than their steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agro_train.train.plot_run", lambda folder: [])
        yield


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group in which this process is alone: enough for models in shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
