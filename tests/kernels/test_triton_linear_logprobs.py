"""The Triton head kernels against float64: by Triton's interpreter, or on a GPU where there is one.

The interpreter's tiles are 16 x 32 x 32 and the gradient's chunks are made tiny below, so that
these shapes have several row blocks, splits, tiles, chunks and steps over D, all with a tail.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from agro_kernels import reference
from agro_kernels._triton import head_gradients
from agro_kernels._triton import linear_logprobs as kernels
from tests.numerics import HeadInputs, assert_close_to_truth, head_inputs, plain_linear_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = [True, True, True]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ODD = (21, 40, 75)  # N, D, V

pytestmark = [
    # NumPy, with which the interpreter computes, remarks on the NaN and inf rows of these tests.
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_gradients, "DLOGITS_CHUNK_BYTES", 2700)  # 21 rows of 32 fp32 columns


def token_temperatures(n: int) -> Tensor:
    return torch.linspace(0.5, 1.5, n, device=DEVICE)


def options_of(name: str, n: int) -> dict[str, Any]:
    """Keyword arguments of the reference; the inputs' own options are in INPUTS."""
    return {
        "plain": {},
        "temperature": {"temperature": 0.7},
        "token_temperature": {"temperature": token_temperatures(n)},
        "softcap": {"softcap": 2.0},
        "everything": {"temperature": token_temperatures(n), "softcap": 5.0},
    }[name]


OPTIONS = ["plain", "temperature", "token_temperature", "softcap", "everything"]


def make_inputs(options: str, shape: tuple[int, int, int], dtype: torch.dtype) -> HeadInputs:
    everything = options == "everything"
    return head_inputs(*shape, dtype=dtype, device=DEVICE, bias=everything, ignored=everything)


def op_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the public functions as the arguments of the ops."""
    temperature = options.get("temperature", 1.0)
    is_tensor = isinstance(temperature, Tensor)
    return {
        "temperature": 1.0 if is_tensor else temperature,
        "token_temperature": temperature if is_tensor else None,
        "softcap": options.get("softcap", 0.0),
        "ignore_index": options.get("ignore_index", -100),
    }


def forward(inputs: HeadInputs, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) of the kernels."""
    return kernels.linear_logprobs_fwd(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias,
        **op_arguments(options), with_entropy=True,
    )  # fmt: skip


def backward(
    inputs: HeadInputs,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: dict[str, Any],
    output_mask: list[bool] = ALL,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of the kernels for upstream (dlogprobs, dlse, dentropy)."""
    _, lse, entropy = forward(inputs, options)
    return kernels.linear_logprobs_bwd(
        *upstream, inputs.hidden, inputs.weight, inputs.targets, inputs.bias,
        **op_arguments(options), lse=lse, entropy=entropy, output_mask=output_mask,
    )  # fmt: skip


def truth_forward(inputs: HeadInputs, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    bias = None if inputs.bias is None else inputs.bias.double()
    logprobs, entropy, lse = reference.linear_logprobs_with_stats(
        inputs.hidden.double(), inputs.weight.double(), inputs.targets, bias=bias, **options
    )
    return logprobs, lse, entropy


def plain_forward(inputs: HeadInputs, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return plain_linear_logprobs(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options
    )


def autograd_backward(
    function: Any, inputs: HeadInputs, upstream: tuple[Tensor | None, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """(dhidden, dweight, dbias) of truth_forward or plain_forward by autograd."""
    leaves = [
        None if tensor is None else tensor.detach().clone().requires_grad_()
        for tensor in (inputs.hidden, inputs.weight, inputs.bias)
    ]
    hidden, weight, bias = leaves
    assert hidden is not None and weight is not None
    copied = HeadInputs(hidden, weight, inputs.targets, bias, inputs.coefficients)
    results = function(copied, options)
    pairs = [
        (result, gradient.to(result.dtype))
        for result, gradient in zip(results, upstream, strict=True)
        if gradient is not None
    ]
    return torch.autograd.grad(
        [result for result, _ in pairs],
        [leaf for leaf in leaves if leaf is not None],
        [gradient for _, gradient in pairs],
    )


def in_float64(inputs: HeadInputs) -> HeadInputs:
    return HeadInputs(
        inputs.hidden.double(),
        inputs.weight.double(),
        inputs.targets,
        None if inputs.bias is None else inputs.bias.double(),
        inputs.coefficients,
    )


def check_forward(inputs: HeadInputs, options: dict[str, Any]) -> None:
    ours = forward(inputs, options)
    truth, plain = truth_forward(inputs, options), plain_forward(inputs, options)
    for name, *three in zip(("logprobs", "lse", "entropy"), ours, truth, plain, strict=True):
        assert three[0].dtype == torch.float32
        assert_close_to_truth(*three, name)


def check_backward(
    inputs: HeadInputs,
    options: dict[str, Any],
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> None:
    if upstream is None:
        c = inputs.coefficients
        upstream = (c, 0.3 * c.flip(0), 0.5 * c.roll(1))
    output_mask = [True, True, inputs.bias is not None]
    ours = backward(inputs, upstream, options, output_mask)
    truth = autograd_backward(truth_forward, in_float64(inputs), upstream, options)
    plain = autograd_backward(plain_forward, inputs, upstream, options)
    for name, our, true, pl in zip(("dhidden", "dweight", "dbias"), ours, truth, plain):  # noqa: B905
        assert our.dtype == inputs.hidden.dtype
        assert_close_to_truth(our, true, pl, name)


# --- Against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_matches_float64(dtype: torch.dtype, options: str) -> None:
    check_forward(make_inputs(options, ODD, dtype), options_of(options, ODD[0]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_backward_matches_float64(dtype: torch.dtype, options: str) -> None:
    check_backward(make_inputs(options, ODD, dtype), options_of(options, ODD[0]))


@pytest.mark.parametrize("shape", [(32, 32, 64), (37, 40, 131), (1, 40, 75), (2, 1, 3), (17, 7, 1)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    inputs = make_inputs("plain", shape, torch.float32)
    check_forward(inputs, {})
    check_backward(inputs, {})


@pytest.mark.parametrize(
    "given", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_backward_of_one_upstream_gradient(given: tuple[bool, bool, bool]) -> None:
    inputs = make_inputs("everything", ODD, torch.float32)
    dlogprobs, dlse, dentropy = (inputs.coefficients if asked else None for asked in given)
    check_backward(inputs, options_of("everything", ODD[0]), (dlogprobs, dlse, dentropy))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_on_a_gpu_at_the_size_of_its_tiles(
    dtype: torch.dtype, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_gradients, "DLOGITS_CHUNK_BYTES", 1000 * 4096 * 4)  # a few chunks
    shape = (1000, 520, 10007)
    check_forward(make_inputs(options, shape, dtype), options_of(options, shape[0]))
    check_backward(make_inputs(options, shape, dtype), options_of(options, shape[0]))


# --- Hard values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1e4, -500.0])
def test_offset_logits(offset: float) -> None:
    inputs = head_inputs(*ODD, device=DEVICE, bias=True)
    assert inputs.bias is not None
    inputs.bias.add_(offset)
    check_forward(inputs, {})
    check_backward(inputs, {})


def test_one_hot_rows() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    # Multiples of 1/64 have exact products and sums: what is judged is the softmax, whose entropy
    # here hangs on a few differences of logits that are themselves in the hundreds.
    inputs.hidden.mul_(30.0).round_()
    inputs.weight.mul_(64.0).round_().div_(64.0)
    check_forward(inputs, {})


def test_gradients_of_one_hot_rows() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    inputs.hidden.abs_()
    inputs.weight.abs_().mul_(-100.0)
    inputs.weight[3] = 0.0  # all other logits are in the negative hundreds
    inputs.targets[::2] = 3
    assert (forward(inputs, {})[0][::2] > -1e-6).all()
    check_backward(inputs, {})


def test_uniform_rows_of_a_ragged_vocabulary() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    inputs.weight.zero_()
    check_forward(inputs, {"softcap": 0.5})
    check_backward(inputs, {"softcap": 0.5})


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_banned_tokens(softcap: float | None) -> None:
    inputs = head_inputs(*ODD, device=DEVICE, bias=True)
    assert inputs.bias is not None
    inputs.bias[:32] = float("-inf")  # a whole tile
    inputs.bias[34::3] = float("-inf")
    inputs.targets[1], inputs.targets[2] = 20, 34
    options = {} if softcap is None else {"softcap": softcap}
    if softcap is None:
        assert forward(inputs, options)[0][1:3].tolist() == [float("-inf")] * 2
    check_forward(inputs, options)
    check_backward(inputs, options)


def test_a_row_without_allowed_tokens_is_nan() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, bias=True)
    assert inputs.bias is not None
    inputs.bias.fill_(float("-inf"))
    logprobs, lse, entropy = forward(inputs, {"temperature": 1000.0})
    assert logprobs.isnan().all() and entropy.isnan().all()
    assert (lse == float("-inf")).all()


def test_nan_in_a_counted_row_stays_in_it() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    before = forward(inputs, {})
    inputs.hidden[5, 3] = float("nan")
    for result, old in zip(forward(inputs, {}), before, strict=True):
        assert result[5].isnan()
        result[5] = old[5]
        assert torch.equal(result, old)


@pytest.mark.parametrize("target", [75, -1, 2**31])
def test_target_outside_the_vocabulary_gives_nan(target: int) -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    before, lse, _ = forward(inputs, {})
    inputs.targets[4] = target
    logprobs, _, _ = forward(inputs, {})
    assert logprobs[4].isnan()
    logprobs[4] = before[4]
    assert torch.equal(logprobs, before)
    upstream = (inputs.coefficients, None, None)
    dhidden, _, _ = backward(inputs, upstream, {}, [True, False, False])
    assert dhidden[4].isnan().all() and int(dhidden.isnan().any(1).sum()) == 1
    for given_lse in (lse, None):
        assert weighted(inputs, given_lse, {})[0].isnan()


# --- Ignored rows ---------------------------------------------------------------------------------


def test_ignored_rows_are_exact_zeros_whatever_they_hold() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, ignored=True)
    inputs.hidden[7] = float("inf")
    ignored = inputs.targets == -100
    assert ignored.any()
    for result in forward(inputs, {}):
        assert (result[ignored] == 0).all() and result.isfinite().all()
    dhidden, dweight, _ = backward(inputs, (inputs.coefficients,) * 3, {}, [True, True, False])
    assert (dhidden[ignored] == 0).all() and dhidden.isfinite().all()
    counted = HeadInputs(
        inputs.hidden[~ignored],
        inputs.weight,
        inputs.targets[~ignored],
        None,
        inputs.coefficients[~ignored],
    )
    assert dweight.isfinite().all()
    check_backward(counted, {}, (counted.coefficients,) * 3)


def test_a_token_may_be_the_ignore_index() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    inputs.targets[::3] = 7
    logprobs, _, _ = forward(inputs, {"ignore_index": 7})
    assert (logprobs[::3] == 0).all()
    check_backward(inputs, {"ignore_index": 7})


def test_rows_without_upstream_gradient_give_zeros_whatever_they_hold() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    inputs.coefficients[::2] = 0
    inputs.hidden[::2] = float("nan")
    upstream = (inputs.coefficients, None, None)
    dhidden, dweight, _ = backward(inputs, upstream, {}, [True, True, False])
    assert (dhidden[::2] == 0).all() and dhidden.isfinite().all() and dweight.isfinite().all()


# --- Weighted sum ---------------------------------------------------------------------------------


def weighted(
    inputs: HeadInputs, lse: Tensor | None, options: dict[str, Any], output_mask: list[bool] = ALL
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels.weighted_logprob_sum_fwd(
        inputs.hidden, inputs.weight, inputs.targets, inputs.coefficients, lse, inputs.bias,
        **op_arguments(options), output_mask=output_mask,
    )  # fmt: skip


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("with_lse", [True, False], ids=["3-gemms", "4-gemms"])
def test_weighted_sum_matches_float64(
    dtype: torch.dtype, options: str, with_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, keywords = make_inputs(options, ODD, dtype), options_of(options, ODD[0])
    inputs.coefficients[5] = 0
    lse = None
    if with_lse:
        lse = forward(inputs, keywords)[1]
        monkeypatch.delattr(kernels, "linear_logprobs_fwd_kernel")  # must not be needed
    total, *ours = weighted(inputs, lse, keywords, [True, True, inputs.bias is not None])
    upstream = (inputs.coefficients, None, None)
    truth = autograd_backward(truth_forward, in_float64(inputs), upstream, keywords)
    plain = autograd_backward(plain_forward, inputs, upstream, keywords)
    for name, our, true, pl in zip(("dhidden", "dweight", "dbias"), ours, truth, plain):  # noqa: B905
        assert_close_to_truth(our, true, pl, name)
    assert total.dtype == torch.float32 and total.shape == ()
    assert_close_to_truth(
        total,
        (truth_forward(inputs, keywords)[0] * inputs.coefficients.double()).sum(),
        (plain_forward(inputs, keywords)[0] * inputs.coefficients).sum(),
        "total",
    )


def test_weighted_sum_leaves_out_rows_with_coefficient_zero() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    inputs.coefficients[::2] = 0
    inputs.hidden[::2] = float("nan")
    lse = forward(inputs, {})[1]
    for given_lse in (lse, None):
        total, dhidden, dweight, _ = weighted(inputs, given_lse, {}, [True, True, False])
        assert total.isfinite() and dweight.isfinite().all()
        assert (dhidden[::2] == 0).all() and dhidden.isfinite().all()


def test_weighted_sum_without_gradients() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    lse = forward(inputs, {})[1]
    total, *gradients = weighted(inputs, lse, {}, [False, False, False])
    assert [gradient.shape for gradient in gradients] == [(0,)] * 3
    assert torch.equal(total, weighted(inputs, None, {}, ALL)[0])


def test_fp16_gradients_do_not_underflow() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, dtype=torch.float16)
    inputs.hidden.mul_(2.0**-6)
    inputs.weight.mul_(2.0**6)  # the same logits; dhidden is far from fp16's smallest number
    upstream = (inputs.coefficients, None, None)
    truth = autograd_backward(truth_forward, in_float64(inputs), upstream, {})
    plain = autograd_backward(plain_forward, inputs, upstream, {})
    tiny = (inputs.coefficients * 2.0**-16, None, None)
    dhidden, _, _ = backward(inputs, tiny, {}, [True, False, False])
    assert_close_to_truth(dhidden * 2.0**16, truth[0], plain[0], "dhidden")


# --- Work and order of work -----------------------------------------------------------------------


@pytest.mark.parametrize("output_mask", [[True, False, False], [False, True, False], [False] * 3])
def test_no_product_for_a_gradient_nobody_asked_for(
    output_mask: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    everything = backward(inputs, (inputs.coefficients, None, None), {}, [True, True, False])
    products: list[torch.Size] = []
    mm_fp32 = head_gradients._mm_fp32

    def counted(a: Tensor, b: Tensor) -> Tensor:
        products.append(a.shape)
        return mm_fp32(a, b)

    monkeypatch.setattr(head_gradients, "_mm_fp32", counted)
    ours = backward(inputs, (inputs.coefficients, None, None), {}, output_mask)
    chunks = -(-ODD[2] // 32) if DEVICE == "cpu" else len(products)
    assert len(products) == (chunks if any(output_mask) else 0)
    for our, whole, asked in zip(ours, everything, output_mask, strict=True):
        assert torch.equal(our, whole) if asked else our.shape == (0,)


def test_a_row_does_not_depend_on_the_batch_it_is_in() -> None:
    inputs = make_inputs("everything", ODD, torch.bfloat16)
    temperatures = token_temperatures(ODD[0])
    whole = forward(inputs, {"temperature": temperatures})
    for rows in ([20], [18, 2, 5, 20], list(range(3, 21))):
        part = HeadInputs(
            inputs.hidden[rows], inputs.weight, inputs.targets[rows], inputs.bias,
            inputs.coefficients[rows],
        )  # fmt: skip
        for result, expected in zip(
            forward(part, {"temperature": temperatures[rows]}), whole, strict=True
        ):
            assert torch.equal(result, expected[rows])


def test_repeat_is_bitwise_equal() -> None:
    inputs = make_inputs("everything", ODD, torch.bfloat16)
    upstream = (inputs.coefficients,) * 3
    first = *forward(inputs, {}), *backward(inputs, upstream, {}), *weighted(inputs, None, {})
    second = *forward(inputs, {}), *backward(inputs, upstream, {}), *weighted(inputs, None, {})
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_strides_and_target_dtype_do_not_matter() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    n, d, v = ODD
    strided = HeadInputs(
        torch.empty(n, 2 * d, device=DEVICE)[:, ::2].copy_(inputs.hidden),
        torch.empty(d, v, device=DEVICE).T.copy_(inputs.weight),
        inputs.targets.int(),
        None,
        torch.empty(n, 2, device=DEVICE)[:, 0].copy_(inputs.coefficients),
    )
    assert not strided.hidden.is_contiguous() and not strided.weight.is_contiguous()
    for result, expected in zip(forward(strided, {}), forward(inputs, {}), strict=True):
        assert torch.equal(result, expected)
    check_backward(strided, {})


def test_no_tokens() -> None:
    inputs = head_inputs(0, 40, 75, device=DEVICE, bias=True)
    for result in forward(inputs, {}):
        assert result.shape == (0,)
    dhidden, dweight, dbias = backward(inputs, (inputs.coefficients, None, None), {})
    assert dhidden.shape == (0, 40)
    assert dweight.shape == (75, 40) and (dweight == 0).all()
    assert dbias.shape == (75,) and (dbias == 0).all()
    assert weighted(inputs, None, {})[0] == 0


def test_entropy_is_empty_unless_asked_for() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    logprobs, lse, entropy = kernels.linear_logprobs_fwd(
        inputs.hidden, inputs.weight, inputs.targets, None, **op_arguments({}), with_entropy=False
    )
    assert entropy.shape == (0,)
    assert torch.equal(logprobs, forward(inputs, {})[0]) and torch.equal(
        lse, forward(inputs, {})[1]
    )
