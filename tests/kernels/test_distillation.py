"""The code that docs/distillation.md prints, run as printed, against the same in plain torch."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agro_kernels import linear_logprobs, linear_topk, reference
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs

PAGE = Path(__file__).parents[2] / "docs" / "distillation.md"
N, V, K = 15, 150, 8


def run(name: str) -> Any:
    """The function `name` of the page."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    (block,) = [block for block in blocks if f"def {name}" in block]
    names: dict[str, Any] = {}
    exec(compile(block, PAGE.name, "exec"), names)
    return names[name]


def heads() -> tuple[HeadInputs, HeadInputs]:
    return head_inputs(N, 16, V), head_inputs(N, 24, V, seed=1)


def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1)


def assert_same(ours: Any, plain: Any, *tensors: Tensor) -> None:
    """Values and the gradients of the first two tensors; `plain` in fp32 and in float64."""
    found = []
    for function, dtype in ((ours, torch.float32), (plain, torch.float64), (plain, torch.float32)):
        cast = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        leaves = [tensor.requires_grad_() for tensor in (x.clone() for x in cast[:2])]
        value = function(*leaves, *cast[2:]).sum()
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for result, truth, other in zip(*found, strict=True):
        assert_close_to_truth(result, truth, other)


def coarse(log_p: Tensor, ids: Tensor) -> Tensor:
    """(N, K + 1) log-probabilities of the ids and of all others as one."""
    others = torch.ones_like(log_p).scatter(1, ids, 0.0)
    tail = (log_p.exp() * others).sum(1, keepdim=True)
    return torch.cat([log_p.gather(1, ids), tail.log()], 1)


def coarse_divergence(kind: str, ids: Tensor, *tensors: Tensor) -> Tensor:
    """Of the student's hidden and weight, then the teacher's; all other ids are one."""
    sides = log_softmax(*tensors[:2]), log_softmax(*tensors[2:])
    log_p, log_q = (coarse(side, ids) for side in sides)
    return reference.divergence(log_p, log_q, kind)


def test_topk_distillation_is_the_kl_of_k_plus_one() -> None:
    student, teacher = heads()
    ids = linear_topk(teacher.hidden, teacher.weight, K).ids

    def ours(*tensors: Tensor) -> Tensor:
        result: Tensor = run("topk_distillation")(*tensors, K)
        return result

    plain = partial(coarse_divergence, "forward", ids)
    assert_same(ours, plain, student.hidden, student.weight, teacher.hidden, teacher.weight)


def test_reverse_kl_is_that_of_k_plus_one() -> None:
    student, teacher = heads()
    ids = linear_topk(student.hidden, student.weight, K).ids

    def ours(hidden: Tensor, weight: Tensor, *of_teacher: Tensor) -> Tensor:
        result: Tensor = run("reverse_kl")(
            linear_logprobs(hidden, weight, ids), linear_logprobs(*of_teacher, ids), ids
        )
        return result

    plain = partial(coarse_divergence, "reverse", ids)
    assert_same(ours, plain, student.hidden, student.weight, teacher.hidden, teacher.weight)


def test_on_policy_distillation_is_its_policy_gradient() -> None:
    student, teacher = heads()
    targets = student.targets.clone()
    targets[3] = -100
    picked = targets.clamp_min(0)[:, None]
    of_teacher = log_softmax(teacher.hidden, teacher.weight).gather(1, picked).squeeze(1)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor, of_teacher: Tensor) -> Tensor:
        logprobs = log_softmax(hidden, weight).gather(1, picked).squeeze(1)
        rewards = (logprobs - of_teacher).detach() * (targets != -100)
        return (rewards * logprobs).sum()

    tensors = student.hidden, student.weight, targets, of_teacher
    assert_same(run("on_policy_distillation"), plain, *tensors)


def test_whole_vocabulary_is_the_three_divergences() -> None:
    student, teacher = heads()

    def plain(hidden: Tensor, weight: Tensor, *of_teacher: Tensor) -> Tensor:
        sides = log_softmax(hidden, weight), log_softmax(*of_teacher)
        of_kinds = [reference.divergence(*sides, kind) for kind in ("forward", "reverse", "jsd")]
        return torch.stack(of_kinds).sum(0)

    tensors = student.hidden, student.weight, teacher.hidden, teacher.weight
    assert_same(run("whole_vocabulary"), plain, *tensors)
