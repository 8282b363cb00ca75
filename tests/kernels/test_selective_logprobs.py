"""selective_logprobs: against float64, in chunks, and without an fp32 copy of all logits."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agro_kernels import reference, selective_logprobs, selective_logprobs_with_stats
from agro_kernels._torch import selective_logprobs as blocked
from agro_kernels.logit_rows import LogitRows
from tests.conftest import SetSizes
from tests.numerics import assert_close_to_truth

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(set_sizes: SetSizes) -> None:
    set_sizes(blocked, CHUNK_ELEMENTS=400)


def logits_and_targets(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of standard deviation 3; every second target is the argmax."""
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    targets.view(-1)[::2] = logits.reshape(-1, shape[-1]).argmax(-1)[::2]
    return logits, targets


def value_and_gradient(logits: Tensor, targets: Tensor, dtype: torch.dtype, how: str, **options):  # type: ignore[no-untyped-def]
    leaf = logits.to(dtype).detach().clone().requires_grad_()
    if how == "ours":
        logprobs = selective_logprobs(leaf, targets, **options)
    else:
        temperature = options.get("temperature", 1.0)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(leaf.dtype if dtype == torch.float64 else torch.float32)
            temperature = temperature[..., None]
        z = (leaf if dtype == torch.float64 else leaf.float()) / temperature
        logprobs = z.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    upstream = torch.linspace(-2.0, 3.0, targets.numel()).view(targets.shape)
    (logprobs * upstream.to(logprobs.dtype)).sum().backward()
    return logprobs.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(13, 31), (2, 5, 64), (1, 1000), (3, 1), (0, 7)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per-token"])
def test_matches_truth(
    shape: tuple[int, ...], dtype: torch.dtype, temperature: float | str
) -> None:
    logits, targets = logits_and_targets(*shape, dtype=dtype)
    value: float | Tensor = 0.5 + torch.rand(targets.shape) if temperature == "per-token" else 1.0
    value = temperature if isinstance(temperature, float) else value
    ours = value_and_gradient(logits, targets, dtype, "ours", temperature=value)
    truth = value_and_gradient(logits, targets, torch.float64, "plain", temperature=value)
    plain = value_and_gradient(logits, targets, dtype, "plain", temperature=value)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == dtype
    assert_close_to_truth(ours[0], truth[0], plain[0], "logprobs")
    assert_close_to_truth(ours[1], truth[1], plain[1], "dlogits")


def test_reference_gradients_match_finite_differences() -> None:
    logits, targets = logits_and_targets(4, 6, dtype=torch.float64)
    targets[1] = -100
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.5])
    for op in (reference.selective_logprobs, selective_logprobs):
        assert torch.autograd.gradcheck(
            lambda z, op=op: op(z, targets, temperature=temperature), logits.requires_grad_()
        )


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_ignored_rows_give_exact_zeros(garbage: float) -> None:
    logits, targets = logits_and_targets(13, 31)
    expected = selective_logprobs(logits, targets)
    targets[::3] = -100
    logits[::3] = garbage
    logits.requires_grad_()
    ours = selective_logprobs(logits, targets)
    ours.sum().backward()
    counted = targets != -100
    assert torch.equal(ours, expected.where(counted, 0.0))
    assert torch.equal(logits.grad[~counted], torch.zeros_like(logits.grad[~counted]))
    assert logits.grad.isfinite().all()


def test_shifted_logits_keep_their_digits() -> None:
    logits, targets = logits_and_targets(13, 31)
    logits = logits.mul(1024).round() / 1024  # so that adding 1e4 is exact
    ours = selective_logprobs(logits + 1e4, targets)
    truth = reference.selective_logprobs(logits.double(), targets)
    assert_close_to_truth(ours, truth, reference.selective_logprobs(logits, targets))


def test_banned_tokens_give_no_nan() -> None:
    logits, targets = logits_and_targets(6, 31)
    logits[:, 5:20] = -torch.inf
    targets = targets % 5
    targets[2] = 7
    logits.requires_grad_()
    ours = selective_logprobs(logits, targets)
    ours.sum().backward()
    assert torch.equal(ours == -torch.inf, torch.arange(6) == 2)
    assert logits.grad.isfinite().all()


def test_views_of_logits_are_not_copied() -> None:
    logits, targets = logits_and_targets(4, 9, 50)
    shifted = logits[:, :-1].requires_grad_()
    with _Largest() as recorder:
        given = LogitRows(shifted.detach(), targets[:, 1:], 1.0, None, -100)
        ours = blocked.selective_logprobs_fwd(given)[0]
    assert recorder.largest <= blocked.CHUNK_ELEMENTS
    assert torch.equal(ours, selective_logprobs(shifted.contiguous(), targets[:, 1:]))
    leaf = logits.clone().requires_grad_()
    selective_logprobs(leaf[:, :-1], targets[:, 1:]).sum().backward()
    expected = logits.clone().requires_grad_()
    selective_logprobs(expected[:, :-1].contiguous(), targets[:, 1:]).sum().backward()
    assert torch.equal(leaf.grad, expected.grad)


class _Largest(TorchDispatchMode):
    """Remembers the largest new tensor, in elements; views do not count."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_fp32_copy_of_all_logits() -> None:
    logits, targets = logits_and_targets(64, 50, dtype=torch.bfloat16)
    with _Largest() as recorder:
        blocked.selective_logprobs_fwd(LogitRows(logits, targets, 1.0, None, -100))
    assert 0 < recorder.largest <= blocked.CHUNK_ELEMENTS < logits.numel()


def test_backward_twice_gives_the_same() -> None:
    logits, targets = logits_and_targets(13, 31)
    logits.requires_grad_()
    total = selective_logprobs(logits, targets).sum()
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    (second,) = torch.autograd.grad(total, logits)
    assert torch.equal(first, second)


def test_compiles_fullgraph_with_backward() -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return selective_logprobs(logits * 2.0, targets, temperature=0.5).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (13, 4):
        logits, targets = logits_and_targets(n, 31)
        logits.requires_grad_()
        expected, ours = loss(logits, targets), compiled(logits, targets)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits)
        )


def test_rejects_out_of_range_targets() -> None:
    logits, targets = logits_and_targets(2, 5, 31)
    targets[1, 2] = 31
    with pytest.raises(ValueError, match=r"targets: .*\[0, 31\).*got 31 at position 7"):
        selective_logprobs(logits, targets)


# --- With entropy, lse and a softcap --------------------------------------------------------------


def stats_and_gradient(
    logits: Tensor, targets: Tensor, dtype: torch.dtype, how: str, softcap: float | None
) -> list[Tensor]:
    """logprobs, entropy, lse and the gradient of a scalar that depends on all three."""
    leaf = logits.to(dtype).detach().clone().requires_grad_()
    temperature = torch.linspace(0.5, 2.0, targets.numel()).view(targets.shape)
    counted = targets != -100
    if how == "ours":
        results = tuple(
            selective_logprobs_with_stats(leaf, targets, temperature=temperature, softcap=softcap)
        )
    else:
        z = (leaf if dtype == torch.float64 else leaf.float()).masked_fill(~counted[..., None], 0.0)
        z = z if softcap is None else softcap * (z / softcap).tanh()
        z = z / temperature.to(z.dtype)[..., None]
        log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
        picked = log_p.gather(-1, targets.where(counted, 0)[..., None]).squeeze(-1)
        everything = picked, -(log_p.exp() * log_p).sum(-1), lse
        results = tuple(result.where(counted, 0.0) for result in everything)
    c = torch.linspace(-2.0, 3.0, targets.numel()).view(targets.shape).to(results[0].dtype)
    loss = (results[0] * c + results[1] * c.cos() + results[2].square() * c.sin()).sum()
    return [result.detach() for result in (*results, *torch.autograd.grad(loss, leaf))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(13, 31), (2, 5, 64), (1, 1000), (0, 7)], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["nocap", "softcap"])
def test_stats_match_truth(
    shape: tuple[int, ...], dtype: torch.dtype, softcap: float | None
) -> None:
    logits, targets = logits_and_targets(*shape, dtype=dtype)
    targets.view(-1)[2::5] = -100
    found = (
        stats_and_gradient(logits, targets, dtype, "ours", softcap),
        stats_and_gradient(logits, targets, torch.float64, "plain", softcap),
        stats_and_gradient(logits, targets, dtype, "plain", softcap),
    )
    names = ("logprobs", "entropy", "lse", "dlogits")
    for name, ours, truth, plain in zip(names, *found, strict=True):
        assert_close_to_truth(ours, truth, plain, name)


def test_stats_gradients_match_finite_differences() -> None:
    logits, targets = logits_and_targets(4, 6, dtype=torch.float64)
    targets[1] = -100

    def stats(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(selective_logprobs_with_stats(z, targets, temperature=0.7, softcap=5.0))

    assert torch.autograd.gradcheck(stats, logits.requires_grad_())


def test_stats_of_banned_and_ignored() -> None:
    logits, targets = logits_and_targets(13, 31)
    logits[:, 20:] = -torch.inf
    logits[4], targets[4] = torch.nan, -100
    targets[:4] = 3
    targets[5:] = 25
    leaf = logits.requires_grad_()
    stats = selective_logprobs_with_stats(leaf, targets)
    assert (stats.logprobs[5:] == -torch.inf).all() and stats.logprobs[:4].isfinite().all()
    assert all(result[4] == 0 for result in stats)
    (stats.logprobs[:4].sum() + stats.entropy.sum() + stats.lse.sum()).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert (leaf.grad[4] == 0).all() and (leaf.grad[:, 20:] == 0).all()


def test_stats_refuse_a_softcap_of_zero() -> None:
    with pytest.raises(ValueError, match="softcap: expected a finite number > 0, got 0.0"):
        selective_logprobs_with_stats(torch.randn(2, 5), torch.zeros(2).long(), softcap=0.0)
