"""The one tolerance law of the kernel tests, and inputs that are hard on purpose.

    |ours - truth|  <=  slack * max|plain - truth|  +  eps * max|truth|        for every element

`truth` is the op in float64; `plain` is the same op written in plain torch, run in the tested
dtype. A kernel is therefore asked to be about as good as the program it replaces, on the same
numbers, and no test chooses a tolerance of its own.

slack and eps follow the dtype of the tested *result*:

* slack: how much worse than plain torch a sum taken in another order may be. A maximum over a few
  hundred elements varies by about two between two orders of an fp32 sum, so 4. In bf16 and fp16 the
  rounding of the result dominates and is the same for everybody, so 2.
* eps: what is left where plain torch happens to be exact (one element, a power of two). Eight ulps
  of fp32 or float64, which covers the rounding of a sum over D; the rounding of a stored bf16
  (2^-9) or fp16 (2^-12) element, doubled.

eps is relative to the largest element of the truth, so where the truth is exactly zero everywhere
the result has to be too.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agro_kernels.head import Head

SLACK = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
EPS = {
    torch.float64: 2.0**-49,
    torch.float32: 2.0**-20,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def tolerance(dtype: torch.dtype, truth: Tensor, plain: Tensor) -> float:
    """The largest allowed error of a result of `dtype`; infinite elements do not count."""
    finite = truth.isfinite()
    if not finite.any():
        return 0.0
    truth, plain = truth[finite].double(), plain[finite].double()
    return float(SLACK[dtype] * (plain - truth).abs().max() + EPS[dtype] * truth.abs().max())


def assert_close_to_truth(ours: Tensor, truth: Tensor, plain: Tensor, name: str = "result") -> None:
    """Assert the law of this file.

    Args:
        ours: the tested result; its dtype chooses slack and eps.
        truth: the same shape, float64. May hold infinities, which `ours` must reproduce; no NaN.
        plain: the same shape, any dtype: the result of plain torch in the tested dtype.
        name: what the message calls the result.
    """
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, got {truth.dtype}"
    assert ours.shape == truth.shape == plain.shape, (
        f"{name}: shapes differ: ours {tuple(ours.shape)}, truth {tuple(truth.shape)}, "
        f"plain {tuple(plain.shape)}"
    )
    if ours.numel() == 0:
        return
    ours64, truth, plain = ours.detach().double().cpu(), truth.detach().cpu(), plain.detach().cpu()
    finite = truth.isfinite()
    assert not truth.isnan().any(), f"{name}: the truth holds NaN, the test is wrong"
    assert torch.equal(ours64[~finite], truth[~finite]), (
        f"{name}: infinities differ from the truth's"
    )
    if not finite.any():
        return
    allowed = tolerance(ours.dtype, truth, plain)
    error = (ours64[finite] - truth[finite]).abs()
    worst = float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
    plain_worst = float((plain.double() - truth)[finite].abs().max())
    assert worst <= allowed, (
        f"{name} ({ours.dtype}): largest error {worst:.3e} > allowed {allowed:.3e}; "
        f"plain torch errs by {plain_worst:.3e}"
    )


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of the head ops."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)
    coefficients: Tensor  # (N,) fp32

    def head(self, **options: Any) -> Head:
        """As the kernels take them; options as those of linear_logprobs."""
        return Head.of(self.hidden, self.weight, self.targets, bias=self.bias, **options)

    def in_dtype(self, dtype: torch.dtype) -> "HeadInputs":
        """A copy in another dtype of which hidden, weight and bias are leaves of autograd."""
        hidden, weight, bias = (
            None if t is None else t.to(dtype).detach().clone().requires_grad_()
            for t in (self.hidden, self.weight, self.bias)
        )
        assert hidden is not None and weight is not None
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    @property
    def leaves(self) -> list[Tensor]:
        """hidden, weight and, if there is one, bias."""
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


def head_inputs(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    ignored: bool = False,
    seed: int = 0,
) -> HeadInputs:
    """Random inputs with logits of standard deviation about 3; every second target is the argmax.

    So some probabilities are close to 1, where 1 - p cancels, and others are tiny. With `ignored`,
    every fourth target is -100 and its row of hidden states is NaN. The numbers depend on the seed
    and the shape only; each dtype rounds the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) * (3.0 / d**0.5)).to(
        dtype
    )
    targets = torch.randint(0, v, (n,), generator=generator)
    if n > 0:
        targets[::2] = (hidden[::2].double() @ weight.double().T).argmax(-1)
    biases = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    coefficients = torch.randn(n, generator=generator)
    if ignored:
        targets[3::4] = -100
        hidden[3::4] = float("nan")
    return HeadInputs(
        hidden.to(device),
        weight.to(device),
        targets.to(device),
        None if biases is None else biases.to(device),
        coefficients.to(device),
    )


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Logits (N, V) as model code writes them: F.linear in the tested dtype, then fp32.

    float64 stays float64.
    """
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def plain_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy), each (N,), differentiable; ignored rows are dropped and give zeros.

    The `plain` side of the law; of float64 inputs, its `truth`. options: bias and softcap, as
    `plain_logits`.
    """
    rows = (targets != ignore_index).nonzero().squeeze(1)
    if isinstance(temperature, Tensor):
        temperature = temperature[rows].to(
            torch.float64 if hidden.dtype == torch.float64 else torch.float32
        )
    logits = plain_logits(hidden[rows], weight, temperature=temperature, **options)
    logprobs_all = logits.log_softmax(-1)
    # exp(logprob) * logprob is 0 * -inf for a banned token; its share of the entropy is zero.
    terms = torch.where(
        logprobs_all == -torch.inf, 0.0, logprobs_all.exp() * logprobs_all.clamp_min(-1e30)
    )
    picked = logprobs_all.gather(-1, targets[rows, None].long()).squeeze(-1)
    zeros = logits.new_zeros(targets.shape[0])
    return (
        zeros.index_put((rows,), picked),
        zeros.index_put((rows,), logits.logsumexp(-1)),
        zeros.index_put((rows,), -terms.sum(-1)),
    )
