"""The example of docs/environments.md, as printed."""

import re
from pathlib import Path
from typing import Any

from agro_train.environments.environment import messages_of, step_of

PAGE = Path(__file__).parents[3] / "docs" / "environments.md"


def test_the_pages_environment_does_what_it_says() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    for turns, rewards in ((["6."], [1.0]), (["5", "6"], [None, 0.5]), (["5", "5"], [None, 0.0])):
        environment = names["SecondTry"]()
        assert messages_of("reset", environment.reset(prompt="2*3?", answer="6")) is None
        said = [step_of(environment.step(text)) for text in turns]
        assert [reward for _, reward in said] == rewards
        assert said[-1][0] is None and all(messages for messages, _ in said[:-1])
