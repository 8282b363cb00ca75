"""The on-policy loss from above: where descending it leads, how fast, and what the cap mends.

On the policy's own samples AGRO's loss also moves the law of the samples. Its gradient is that of
the KL-regularised policy gradient and a likelihood-ratio term (lr_weight 1), which has the optimum
too, but also falls towards every deterministic policy. Four questions, each with a plot: where is
the ridge between the two, which success rates fall, how often the optimum is reached from pi_ref,
and how many updates it takes where it is.
"""

from pathlib import Path

from agro_train.experiments.landscape import basin, speed, success_rate, two_arms
from agro_train.experiments.tabular import Claim


def run(output_dir: Path, quick: bool) -> list[Claim]:
    """Writes a CSV and a PNG a question, landscape_*; quick: fewer problems and updates."""
    found: list[Claim] = []
    for question in (two_arms, success_rate, basin, speed):
        found += question.run(output_dir, quick)
    return found
