"""A model's architecture: known ones, folders with config.json alone, and names that need the
network."""

from pathlib import Path

import pytest

from agro_train.config import TrainConfig
from agro_train.plan.architecture import find_architecture, shortened
from agro_train.plan.memory import weigh
from agro_train.refusal import Refusal

FULL = TrainConfig(gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496),
    ],
)
def test_llama3_has_its_public_number_of_weights(model: str, count: int) -> None:
    weights = weigh(find_architecture(model), FULL)
    assert weights.count == weights.trained_count == count
    assert weights.whole == 4 * count


def test_a_folder_with_its_configuration_alone_is_enough(tmp_path: Path) -> None:
    short = shortened(find_architecture("meta-llama/Meta-Llama-3-8B"), 2)
    short.save_pretrained(tmp_path)
    found = find_architecture(str(tmp_path))
    assert (found.num_hidden_layers, found.hidden_size) == (2, 4096)


def test_a_model_that_is_not_here_is_one_sentence() -> None:
    with pytest.raises(Refusal, match="whose config.json is on this machine.*give model=FOLDER"):
        find_architecture("nobody/no-such-model")
