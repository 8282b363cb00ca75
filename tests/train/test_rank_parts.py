"""Parts of a list that ranks work on, and what the main rank finds for all."""

import pytest

from agro_train.ranks import Ranks
from agro_train.refusal import Refusal


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_every_item_is_one_ranks(count: int, world: int) -> None:
    items = list(range(count))
    ranks = [Ranks(rank, world) for rank in range(world)]
    assert [item for one in ranks for item in one.block(items)] == items
    assert sorted(item for one in ranks for item in items[one.rank_slice]) == items
    sizes = [len(one.block(items)) for one in ranks]
    assert max(sizes) - min(sizes) <= 1


def test_alone_the_main_rank_asks_nobody() -> None:
    def refuse() -> None:
        raise Refusal("no")

    assert Ranks().gather([1, 2]) == [1, 2]
    assert Ranks().from_main(lambda: 3) == 3
    with pytest.raises(Refusal, match="no"):
        Ranks().from_main(refuse)
