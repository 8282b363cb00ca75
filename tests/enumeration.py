"""Small worlds in which every expectation is a finite sum, in float64.

A world has Y outcomes (whole sequences) of a policy with parameters theta. An n-sample estimator is
averaged exactly: every one of the Y^n tuples of outcomes is one group of the op under test.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETA = 0.37


@dataclass(frozen=True)
class World:
    """Y outcomes of up to T tokens; everything float64."""

    token_logprobs: Callable[[Tensor], Tensor]  # theta (d,) -> (Y, T), 0 after the end
    mask: Tensor  # (Y, T) bool
    ref: Tensor  # (Y, T), 0 after the end
    rewards: Tensor  # (Y,)
    behaviour: Tensor  # (Y,): a law of the data that is not the policy's
    theta: Tensor  # (d,)

    def logprobs(self, theta: Tensor | None = None) -> Tensor:
        return self.token_logprobs(self.theta if theta is None else theta).sum(1)

    @property
    def ref_logprobs(self) -> Tensor:
        return self.ref.sum(1)

    @property
    def policy(self) -> Tensor:
        return self.logprobs().exp()

    @property
    def optimum(self) -> Tensor:
        """(Y,) pi* = pi_ref exp(r / beta) / Z."""
        return (self.ref_logprobs + self.rewards / BETA).softmax(0)

    def scores(self) -> Tensor:
        """(Y, T, d): gradient of every token's log-probability."""
        return torch.autograd.functional.jacobian(self.token_logprobs, self.theta)

    def regularized(self, theta: Tensor) -> Tensor:
        return self.rewards - BETA * (self.logprobs(theta) - self.ref_logprobs)

    def gradient(self, objective: Callable[[Tensor], Tensor]) -> Tensor:
        theta = self.theta.clone().requires_grad_()
        return torch.autograd.grad(objective(theta), theta)[0]


def bandit(num_arms: int = 6, num_features: int = 4, seed: int = 1) -> World:
    """One token, log-linear policy with fewer parameters than arms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = normal(num_arms, num_features)
    return World(
        token_logprobs=lambda theta: (features @ theta).log_softmax(0)[:, None],
        mask=torch.ones(num_arms, 1, dtype=torch.bool),
        ref=normal(num_arms).log_softmax(0)[:, None],
        rewards=normal(num_arms),
        behaviour=normal(num_arms).softmax(0),
        theta=normal(num_features),
    )


def sequences(tied: bool, vocabulary: int = 3, length: int = 2, seed: int = 3) -> World:
    """Autoregressive; the last token of the vocabulary ends a sequence, `length` truncates it.

    tied: five parameters shared by all prefixes, otherwise one logit a prefix and token.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    end = vocabulary - 1
    outcomes = [
        tokens
        for n in range(1, length + 1)
        for tokens in itertools.product(range(vocabulary), repeat=n)
        if end not in tokens[:-1] and (n == length or tokens[-1] == end)
    ]
    prefixes = sorted({tokens[:t] for tokens in outcomes for t in range(len(tokens))})
    mask = torch.zeros(len(outcomes), length, dtype=torch.bool)
    prefix, token = torch.zeros(2, len(outcomes), length, dtype=torch.int64)
    for i, tokens in enumerate(outcomes):
        for t, value in enumerate(tokens):
            mask[i, t], prefix[i, t], token[i, t] = True, prefixes.index(tokens[:t]), value

    def of_table(logits: Tensor) -> Tensor:
        return logits.log_softmax(1)[prefix, token].where(mask, 0.0)

    num_prefixes = len(prefixes)
    features = normal(num_prefixes, vocabulary, 5)
    return World(
        token_logprobs=(
            (lambda theta: of_table(features @ theta))
            if tied
            else (lambda theta: of_table(theta.view(num_prefixes, vocabulary)))
        ),
        mask=mask,
        ref=of_table(normal(num_prefixes, vocabulary)),
        rewards=normal(len(outcomes)),
        behaviour=of_table(normal(num_prefixes, vocabulary)).sum(1).exp(),
        theta=normal(5 if tied else num_prefixes * vocabulary),
    )


WORLDS = {
    "bandit": bandit(),
    "tabular-sequences": sequences(tied=False),
    "tied-sequences": sequences(tied=True),
}


def all_tuples(num_outcomes: int, n: int) -> tuple[Tensor, Tensor]:
    """Outcome of every row and group of every row, each (Y^n * n,): one group a tuple."""
    tuples = torch.cartesian_prod(*[torch.arange(num_outcomes)] * n).view(-1, n)
    return tuples.flatten(), torch.arange(len(tuples)).repeat_interleave(n)


def expectation(laws: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """E sum_i c_i 1[y_i = y], (Y,) or (Y, T), of `coefficients` (Y^n * n, ...) of `all_tuples`.

    Slot i of a tuple is drawn from laws[i] (Y,), independently.
    """
    n, num_outcomes = len(laws), len(laws[0])
    outcomes, _ = all_tuples(num_outcomes, n)
    tuples = outcomes.view(-1, n)
    probability = torch.stack([laws[i][tuples[:, i]] for i in range(n)]).prod(0)
    weighted = coefficients * probability.repeat_interleave(n).view(
        -1, *[1] * (coefficients.ndim - 1)
    )
    zeros = coefficients.new_zeros(num_outcomes, *coefficients.shape[1:])
    return zeros.index_add_(0, outcomes, weighted)


def expected_gradient(world: World, laws: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """E sum_i c_i * gradient of logprob_i, (d,)."""
    per_outcome = expectation(laws, coefficients)
    if per_outcome.ndim == 1:
        per_outcome = per_outcome[:, None].expand(world.mask.shape)
    return torch.einsum("yt,ytd->d", per_outcome, world.scores())


def weighted_variance(law: Tensor, values: Tensor) -> Tensor:
    mean = (law * values).sum() / law.sum()
    return (law * (values - mean) ** 2).sum() / law.sum()
