"""What a command says to a user whose mistake it refuses."""

from collections.abc import Sequence

import pytest

from agro_train.cli import main


def refusal(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that is shown, of a command that ends with exit status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("agro: ") and said.count("\n") == 1
    return said
