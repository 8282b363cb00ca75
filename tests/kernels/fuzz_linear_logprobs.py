"""Random calls of the native CPU ops against float64: shapes, layouts, options and values.

    python -m tests.kernels.fuzz_linear_logprobs --cases 10000 --seed 0

Every case follows from its number alone. One that fails is printed with it, and

    python -m tests.kernels.fuzz_linear_logprobs --cases 1 --seed <number>

repeats it. The tolerance is the law of `tests/numerics.py`. On the few elements of a fuzzed shape
plain torch can be right by luck, so its error is the largest of several runs on inputs that differ
by an ulp.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from agro_kernels import reference, weighted_logprob_sum
from agro_kernels._cpu import linear_logprobs as cpu
from agro_kernels._cpu import native
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from agro_kernels.kept_logits import empty_kept_logits
from tests.numerics import assert_close_to_truth, plain_linear_logprobs

LAYOUTS = ("contiguous", "padded", "offset", "every second", "transposed")
PERTURBED = 3  # runs of a plain program
NAMES = ("logprobs", "lse", "entropy", "dhidden", "dweight", "dbias")


@dataclass
class Case:
    """One call of forward, backward and known-coefficients form."""

    isa: str
    threads: int
    dtype: torch.dtype
    hidden: Tensor  # (N, D), in its layout
    weight: Tensor  # (V, D), in its layout
    targets: Tensor  # (N,) int32 or int64
    bias: Tensor | None  # (V,)
    temperature: float
    token_temperature: Tensor | None  # (N,)
    softcap: float
    ignore_index: int
    upstream: list[Tensor | None]  # of logprobs, lse and entropy, each (N,)
    coefficients: Tensor  # (N,)
    with_lse: bool
    output_mask: list[bool]
    weight_grad: Tensor | None  # (V, D) fp32
    keep_logits_bytes: int
    summary: str


def laid_out(values: Tensor, layout: str, random: torch.Generator) -> Tensor:
    """The numbers of `values` (rows, D) in memory that holds NaN everywhere else."""
    rows, d = values.shape
    pad = int(torch.randint(1, 9, (), generator=random))
    if layout == "padded":
        place = values.new_full((rows, d + pad), torch.nan)[:, :d]
    elif layout == "offset":
        place = values.new_full((rows * d + pad,), torch.nan)[pad:].view(rows, d)
    elif layout == "every second":
        place = values.new_full((2 * rows, d), torch.nan)[::2]
    elif layout == "transposed":
        place = values.new_full((d, rows), torch.nan).T
    else:
        place = torch.empty_like(values)
    return place.copy_(values)


def random_case(number: int, isas: list[str]) -> Case:
    random = torch.Generator().manual_seed(number)

    def integer(low: int, high: int) -> int:
        """In [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=random))

    def chance(probability: float) -> bool:
        return bool(torch.rand((), generator=random) < probability)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    n = integer(0, 3) if chance(0.2) else integer(1, 100)
    d = integer(1, 3) if chance(0.1) else integer(1, 600 if chance(0.1) else 90)
    v = integer(1, 5) if chance(0.1) else integer(1, 1500 if chance(0.1) else 300)
    dtype = [torch.float32, torch.bfloat16, torch.float16][integer(0, 2)]
    isa, threads = isas[integer(0, len(isas) - 1)], integer(1, 5)
    layouts = [LAYOUTS[integer(0, 4)] if chance(0.5) else "contiguous" for _ in range(2)]
    spread = [0.0, 0.3, 3.0, 3.0, 3.0, 20.0][integer(0, 5)]  # of the logits
    hidden = laid_out(normal(n, d).to(dtype), layouts[0], random)
    weight = laid_out((normal(v, d) * spread / d**0.5).to(dtype), layouts[1], random)

    bias = normal(v).to(dtype) if chance(0.5) else None
    shift = [1e4, -1e4, -150.0][integer(0, 2)] if bias is not None and chance(0.2) else 0.0
    allowed = torch.arange(v)
    if bias is not None:
        bias = bias + shift
        if chance(0.3):
            allowed = torch.randperm(v, generator=random)[: integer(1, v)]
            banned = torch.ones(v, dtype=torch.bool)
            banned[allowed] = False
            bias[banned] = -torch.inf

    targets = allowed[torch.randint(0, len(allowed), (n,), generator=random)]
    ignore_index = -100 if chance(0.8) else integer(0, v - 1)
    if chance(0.5):
        left_out = torch.rand(n, generator=random) < [0.1, 0.5, 0.97][integer(0, 2)]
        targets[left_out] = ignore_index
    hidden_is_read = targets != ignore_index
    hidden[~hidden_is_read] = torch.nan
    token_temperature = None
    if chance(0.3):
        token_temperature = 0.5 + torch.rand(n, generator=random)
        token_temperature[~hidden_is_read] = torch.nan
    coefficients = normal(n)
    coefficients[torch.rand(n, generator=random) < 0.2] = 0.0
    return Case(
        isa=isa,
        threads=threads,
        dtype=dtype,
        hidden=hidden,
        weight=weight,
        targets=targets.to([torch.int32, torch.int64][integer(0, 1)]),
        bias=bias,
        temperature=[1.0, 0.6, 1.7][integer(0, 2)] if token_temperature is None else 1.0,
        token_temperature=token_temperature,
        softcap=[0.0, 0.0, 5.0, 30.0][integer(0, 3)] if shift == 0.0 else 0.0,
        ignore_index=ignore_index,
        upstream=[normal(n) if chance(0.7) else None for _ in range(3)],
        coefficients=coefficients,
        with_lse=chance(0.5),
        output_mask=[chance(0.8) for _ in range(3)],
        weight_grad=normal(v, d) if chance(0.2) else None,
        keep_logits_bytes=integer(0, 2 * n * v * 4 + 1) if chance(0.5) else 0,
        summary=f"case {number}: N={n} D={d} V={v} {dtype} {isa} threads={threads} "
        f"layouts={layouts} spread={spread} shift={shift}",
    )


def by_torch(
    case: Case, dtype: torch.dtype, perturbed: int = 0, from_lse: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The statistics (logprobs, lse, entropy) and gradients, then the gradients of the
    known-coefficients form, by a plain program in `dtype`.

    perturbed > 0: every input is first moved up or down by an ulp of fp32, or left, at random.
    from_lse: log_p is z - lse, as a backward pass has it that knows lse as one number; otherwise
    log_softmax.
    """
    random = torch.Generator().manual_seed(perturbed)

    def moved(values: Tensor) -> Tensor:
        if perturbed == 0:
            return values.clone()
        ulps = torch.randint(-1, 2, values.shape, generator=random)
        return values * (1.0 + 2.0**-23 * ulps)

    counted = case.targets != case.ignore_index
    targets = case.targets.long().where(counted, -1)
    leaves = [case.hidden, case.weight] + ([] if case.bias is None else [case.bias])
    leaves = [moved(leaf.to(dtype)).requires_grad_() for leaf in leaves]
    temperature: float | Tensor = case.temperature
    if case.token_temperature is not None:
        temperature = case.token_temperature.where(counted, 1.0)
    if isinstance(temperature, Tensor):
        temperature = moved(temperature)
    else:
        temperature = float(moved(torch.tensor(temperature, dtype=torch.float64)))
    softcap = float(moved(torch.tensor(case.softcap, dtype=torch.float64)))
    options = {
        "bias": leaves[2] if len(leaves) > 2 else None,
        "temperature": temperature,
        "softcap": softcap or None,
        "ignore_index": -1,
    }
    if from_lse:
        logprobs, entropy, lse = reference.linear_logprobs_with_stats(
            *leaves[:2], targets, **options
        )
        results = logprobs, lse, entropy
    else:
        results = plain_linear_logprobs(*leaves[:2], targets, **options)
    loss = results[0].sum() * 0.0
    for result, gradient in zip(results, case.upstream, strict=True):
        if gradient is not None:
            loss = loss + (result * gradient).sum()
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    total = (results[0] * case.coefficients).where(case.coefficients != 0.0, 0.0).sum()
    known = torch.autograd.grad(total, leaves)
    return [result.detach() for result in (*results, *gradients)], list(known)


def by_native(case: Case) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """As `by_torch`, from the library; and the total of the known-coefficients form."""
    head = Head(
        case.hidden,
        case.weight,
        case.targets,
        case.bias,
        case.temperature,
        case.token_temperature,
        case.softcap,
        case.ignore_index,
        round_logits=None,
        kept=None,
    )
    kept = empty_kept_logits(head, case.keep_logits_bytes)
    logprobs, lse, entropy = cpu.linear_logprobs_fwd(head, True, kept)
    weight_grad = None if case.weight_grad is None else case.weight_grad.clone()
    upstream = Upstream(*case.upstream, lse, entropy)
    gradients = cpu.linear_logprobs_bwd(
        Backward(upstream, head, case.output_mask, weight_grad, kept)
    )
    if weight_grad is not None and case.weight_grad is not None:
        assert gradients[1].shape == (0,)
        if case.output_mask[1]:
            gradients = gradients[0], weight_grad, gradients[2]
        else:
            assert torch.equal(weight_grad, case.weight_grad)
    total, known = known_form(case, lse)
    return [logprobs, lse, entropy, *gradients], known, total


def known_form(case: Case, lse: Tensor) -> tuple[Tensor, list[Tensor]]:
    """weighted_logprob_sum and its gradients of hidden, weight, bias; (0,) if not asked for."""
    leaves = [
        None if t is None else t.detach().requires_grad_(asked)
        for t, asked in zip((case.hidden, case.weight, case.bias), case.output_mask, strict=True)
    ]
    hidden, weight, bias = leaves
    total = weighted_logprob_sum(
        hidden,
        weight,
        case.targets,
        case.coefficients,
        lse=lse if case.with_lse else None,
        bias=bias,
        temperature=case.temperature if case.token_temperature is None else case.token_temperature,
        softcap=case.softcap or None,
        ignore_index=case.ignore_index,
    )
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(total, wanted) if wanted else ())
    empty = total.detach().new_empty(0)
    known = [next(found) if leaf is not None and leaf.requires_grad else empty for leaf in leaves]
    return total.detach(), known


def check(case: Case) -> None:
    """Assert the law for every result of the case."""
    library = native.load()
    assert library is not None
    native.choose_isa(library, case.isa)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        ours, ours_known, total = by_native(case)
        torch.set_num_threads(1)  # the shapes are too small for torch to share out
        assert_lawful(case, ours, ours_known, total)
    finally:
        torch.set_num_threads(before)


def assert_lawful(case: Case, ours: list[Tensor], ours_known: list[Tensor], total: Tensor) -> None:
    """Compare the results of `by_native`."""
    truth, truth_known = by_torch(case, torch.float64)
    plain = [
        by_torch(case, torch.float32, perturbed, from_lse)
        for perturbed in range(PERTURBED)
        for from_lse in (False, True)
    ]
    # Logits of half precision inputs are not rounded; what is rounded on the way to a gradient of
    # half precision, is rounded by the plain program too.
    in_dtype, in_dtype_known = by_torch(case, case.dtype)
    plain.append((plain[0][0][:3] + in_dtype[3:], in_dtype_known))
    if case.weight_grad is not None:
        truth[4] = truth[4] + case.weight_grad
        for results, _ in plain:
            results[4] = results[4].float() + case.weight_grad
    asked = [True] * 3 + case.output_mask
    if case.bias is None:
        asked[5] = False  # whatever was asked for: the reference has no bias to differentiate by
    for form, names, results, truths, plains in (
        ("", NAMES, ours, truth, [first for first, _ in plain]),
        ("known ", NAMES[3:], ours_known, truth_known, [known for _, known in plain]),
    ):
        for index, name in enumerate(names):
            if not asked[NAMES.index(name)]:
                assert case.bias is None or results[index].shape == (0,), name
                continue
            close_to_truth(results[index], truths[index], [p[index] for p in plains], form + name)
    # The law for a sum: as close to the truth as its terms allow together. Each is z_y - lse.
    c = case.coefficients.double().where(case.targets != case.ignore_index, 0.0)
    terms = (c * truth[0]).abs().sum() + (c * truth[1]).abs().sum()
    error = max(float((c * (first[0] - truth[0])).abs().sum()) for first, _ in plain)
    pair = torch.stack([c @ truth[0], terms])
    close_to_truth(torch.stack([total.double(), terms]).float(), pair, [pair + error], "total")


def close_to_truth(ours: Tensor, truth: Tensor, plains: list[Tensor], name: str) -> None:
    """The law, with the largest error of several plain results for each element."""
    errors = [(plain.double() - truth).nan_to_num(nan=0.0).abs() for plain in plains]
    assert_close_to_truth(ours, truth, truth + torch.stack(errors).amax(0), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--library", type=Path, help="a build of csrc other than the package's")
    arguments = parser.parse_args()
    if arguments.library is not None:
        native.LIBRARY_PATH = arguments.library
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    library = native.load()
    if library is None:
        raise SystemExit("there is no native library to test")
    isas = library.agro_available_isas().decode().split(",")
    began, failures = time.monotonic(), 0
    for number in range(arguments.seed, arguments.seed + arguments.cases):
        case = random_case(number, isas)
        try:
            check(case)
        except AssertionError as error:
            failures += 1
            print(f"{case.summary}\n  {error}", flush=True)
    print(f"{arguments.cases} cases, {failures} failed, {time.monotonic() - began:.0f} s")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
