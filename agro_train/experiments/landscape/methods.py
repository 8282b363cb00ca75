"""The settings of on-policy AGRO that the landscape compares."""

from typing import NamedTuple

from agro_train.experiments import tabular
from agro_train.experiments.tabular import Bandits, Direction
from agro_train.watch import style


class Method(NamedTuple):
    """A setting of on-policy AGRO, in `agro_coefficients`' words."""

    label: str
    colour: str
    lr_weight: float
    lr_cap: bool


METHODS = {
    "exact": Method("exact on-policy", style.BLACK, 1.0, False),
    "capped": Method("capped on-policy", style.SKY, 1.0, True),
    "policy_gradient": Method("policy gradient", style.VERMILLION, 0.0, False),
}


def direction_of(method: str, bandits: Bandits) -> Direction:
    """Exact expected updates of a method on the policy's own samples."""
    return tabular.on_policy_agro(bandits, METHODS[method].lr_weight, METHODS[method].lr_cap)
