"""`reward=environment`: what the environment gave, for a rollout of several turns."""

from collections.abc import Sequence

from agro_train.rewards.reward import Outcome, Reward
from agro_train.types import Rollout


class EnvironmentReward(Reward):
    """The sum of the numbers that the environment's steps returned; see docs/environments.md."""

    name = "environment"

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Outcome(rollout.environment_reward) for rollout in rollouts]
