"""Whether what is timed is right: compared with float64 before it is timed.

Two questions. How large are the errors of a provider? `errors` measures them on a small shape,
against results computed in float64. Is the result of this call on a large shape right? `objection`
computes a few of its rows in float64.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from agro_kernels import reference
from benchmarks.head.providers.base import Inputs, Results, Step

# Larger errors mean another function, not another rounding. Rounding logits of up to about 30 to
# bf16 moves them by up to 2**-4, and a few of the roundings of a naive program add up. fp32
# products that are allowed to use bf16 inside are judged as bf16.
LOGPROB_LIMIT = {torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
GRADIENT_LIMIT = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
CHECKED_ROWS = 4
VOCABULARY_BLOCK = 8192


@dataclass(frozen=True)
class Errors:
    """Against float64. None where a form has no such result."""

    logprob_error: float | None = None  # largest, nats
    entropy_error: float | None = None  # largest, nats
    dhidden_error: float | None = None  # norm of the difference over the norm of the truth
    dweight_error: float | None = None


def errors(step: Step) -> Errors:
    """Runs the step and compares all its results with float64. For small shapes."""
    step()
    results = step.results()
    truth = truth_of(step)

    def largest(ours: Tensor | None, exact: Tensor | None) -> float | None:
        if ours is None or exact is None:
            return None
        return float((ours.double() - exact).abs().max())

    def relative(ours: Tensor | None, exact: Tensor | None) -> float | None:
        if ours is None or exact is None:
            return None
        return float((ours.double() - exact).norm() / exact.norm())

    return Errors(
        largest(results.logprobs, truth.logprobs),
        largest(results.entropy, truth.entropy),
        relative(results.dhidden, truth.dhidden),
        relative(results.dweight, truth.dweight),
    )


def truth_of(step: Step) -> Results:
    """All the results of a step, from the reference in float64 and autograd."""
    inputs = step.inputs
    hidden = inputs.hidden.detach().double().requires_grad_(inputs.hidden.requires_grad)
    weight = inputs.weight.detach().double().requires_grad_(inputs.weight.requires_grad)
    logprobs, entropy, _ = reference.linear_logprobs_with_stats(
        hidden, weight, inputs.targets, softcap=inputs.softcap
    )
    if step.form != "forward":
        total = (logprobs * inputs.coefficients.double()).sum()
        if step.with_entropy:
            total = total + (entropy * inputs.entropy_coefficients.double()).sum()
        total.backward()
    return Results(
        None if step.form == "known_coefficients" else logprobs.detach(),
        entropy.detach() if step.with_entropy else None,
        hidden.grad,
        weight.grad,
    )


def beyond_limits(found: Errors, dtype: torch.dtype) -> str | None:
    """None if rounding in this dtype explains the errors, else which is larger."""
    limits = {
        "logprob_error": LOGPROB_LIMIT[dtype],
        "entropy_error": LOGPROB_LIMIT[dtype],
        "dhidden_error": GRADIENT_LIMIT[dtype],
        "dweight_error": GRADIENT_LIMIT[dtype],
    }
    for field in fields(found):
        value = getattr(found, field.name)
        if value is not None and not value <= limits[field.name]:
            return f"wrong: {field.name} {value:.2e} > {limits[field.name]:.0e}"
    return None


def objection(step: Step, dtype: torch.dtype) -> str | None:
    """None if the step's results are right, else what is wrong. For large shapes.

    A few rows of logprobs, entropy and dhidden are compared with float64. dweight takes part in an
    identity: with z = hidden @ weight.T both sum(dhidden * hidden) and sum(dweight * weight) are
    sum(dz * z). A softcap keeps it, since dz is the gradient at the uncapped logits.
    """
    results, inputs = step.results(), step.inputs
    n = inputs.hidden.shape[0]
    rows = torch.linspace(0, n - 1, min(CHECKED_ROWS, n)).long()
    # Likely targets are on the even rows: both kinds of row are looked at.
    rows = (rows + (torch.arange(len(rows)) - rows) % 2).clamp_max(n - 1).to(inputs.hidden.device)
    exact = _truth_of_rows(inputs, rows, step.with_entropy)

    def largest(ours: Tensor | None, truth: Tensor | None) -> float | None:
        return None if ours is None or truth is None else float((ours[rows] - truth).abs().max())

    dhidden_error = None
    if results.dhidden is not None and exact.dhidden is not None:
        difference = results.dhidden[rows].double() - exact.dhidden
        # Not over the norm of the rows themselves: those of certain tokens are nearly zero.
        weight_norm = inputs.weight.detach().norm(dtype=torch.float32) / len(inputs.weight) ** 0.5
        scale = inputs.coefficients[rows].norm() * weight_norm
        dhidden_error = float(difference.norm() / scale)
    dweight_error = None
    if results.dhidden is not None and results.dweight is not None:
        hidden = inputs.hidden.detach().double()
        scale = results.dhidden.double().norm() * hidden.norm()
        over_tokens = (results.dhidden.double() * hidden).sum()
        over_vocabulary = sum(
            (dw.double() * w.double()).sum()
            for dw, w in zip(
                results.dweight.split(VOCABULARY_BLOCK),
                inputs.weight.detach().split(VOCABULARY_BLOCK),
                strict=True,
            )
        )
        dweight_error = float(abs(over_vocabulary - over_tokens) / scale)
    return beyond_limits(
        Errors(
            largest(results.logprobs, exact.logprobs),
            largest(results.entropy, exact.entropy),
            dhidden_error,
            dweight_error,
        ),
        dtype,
    )


@torch.no_grad()
def _truth_of_rows(inputs: Inputs, rows: Tensor, with_entropy: bool) -> Results:
    """The results of a few tokens in float64, the weight upcast a block at a time."""
    hidden = inputs.hidden[rows].double()
    blocks = inputs.weight.split(VOCABULARY_BLOCK)
    z = torch.cat([hidden @ block.double().T for block in blocks], dim=1)
    slope = torch.ones_like(z)
    if inputs.softcap is not None:
        t = torch.tanh(z / inputs.softcap)
        z, slope = inputs.softcap * t, 1.0 - t * t
    log_p = z.log_softmax(-1)
    p, column = log_p.exp(), inputs.targets[rows, None]
    entropy = -(p * log_p).sum(-1)
    coefficients = inputs.coefficients[rows, None].double()
    dz = -coefficients * p
    dz.scatter_add_(1, column, coefficients)
    if with_entropy:
        dentropy = inputs.entropy_coefficients[rows, None].double()
        dz -= dentropy * p * (log_p + entropy[:, None])
    dz *= slope
    dhidden = torch.zeros_like(hidden)
    for dz_block, block in zip(dz.split(VOCABULARY_BLOCK, dim=1), blocks, strict=True):
        dhidden += dz_block @ block.double()
    return Results(log_p.gather(1, column).squeeze(1), entropy, dhidden, None)
