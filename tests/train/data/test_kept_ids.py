"""Kept ids as text: what was written comes back, in little room, and no other text is read."""

import base64
import json
import zlib

import numpy as np
import pytest

from agro_train.data import kept_ids


def test_sets_come_back_in_rising_order() -> None:
    sets = [[7, 3, 128_000], [0], [5, 5, 4], list(range(1024))]
    found = kept_ids.decode(kept_ids.encode(sets))
    assert [ids.tolist() for ids in found] == [[3, 7, 128_000], [0], [4, 5], list(range(1024))]


def test_form_is_the_documented_one() -> None:
    written = zlib.decompress(base64.b64decode(kept_ids.encode([[9, 4], [2]])))
    numbers = np.frombuffer(written, "<i4")
    assert numbers.tolist() == [2, 2, 1, 4, 5, 2]


def test_a_thousand_nuclei_take_less_than_half_of_what_lists_do() -> None:
    generator = np.random.default_rng(0)
    sets = [generator.integers(0, 128_000, generator.integers(1, 50)).tolist() for _ in range(1000)]
    assert len(kept_ids.encode(sets)) < 0.5 * len(json.dumps(sets))


WHOLE = kept_ids.encode([[1, 2], [3]])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense!",
        WHOLE[:-8],
        base64.b64encode(b"plain").decode(),
        *(
            base64.b64encode(zlib.compress(np.array(numbers, "<i4").tobytes())).decode()
            for numbers in ([], [2, 1], [2, 1, 1, 5], [1, 0], [-1, 3], [1, 1, 5, 6])
        ),
    ],
)
def test_other_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not the base64 of zlib|cut short"):
        kept_ids.decode(text)
