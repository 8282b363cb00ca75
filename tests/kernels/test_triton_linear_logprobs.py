"""The Triton head kernels against float64: by Triton's interpreter, or on a GPU where there is one.

The interpreter's tiles are 16 x 32 x 32 and the gradient's chunks are made tiny below, so that
these shapes have several row blocks, splits, tiles, chunks of both kinds and steps over D, all with
a tail.
"""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import agro_kernels  # noqa: F401  (registers pack_kept_ids)
from agro_kernels import kept_logits, reference
from agro_kernels import tiles as configs
from agro_kernels._triton import gemm, head_gradients, launch
from agro_kernels._triton import linear_logprobs as kernels
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from agro_kernels.kept_logits import KeptLogits
from tests.conftest import SetSizes
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
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def several_chunks(set_sizes: SetSizes) -> None:
    """Of 16 rows by 32 fp32 columns."""
    set_sizes(head_gradients, DLOGITS_CHUNK_BYTES=2100, TOKEN_CHUNK=16)
    set_sizes(kernels, TOKEN_CHUNK=16)


def token_temperatures(n: int) -> Tensor:
    return torch.linspace(0.5, 1.5, n, device=DEVICE)


def kept_sets(targets: Tensor, v: int) -> Tensor:
    """(N, 9) ids to keep, the targets among them; some padding, every fifth row all padding."""
    n = targets.shape[0]
    ids = torch.randint(0, v, (n, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ids[:, 3] = targets.clamp_min(0)
    ids[1::3, 4:] = -1
    ids[::5] = -1
    return ids


OPTIONS = ["plain", "temperature", "token_temperature", "softcap", "rounded", "kept", "everything"]


def case(
    options: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[HeadInputs, dict[str, Any]]:
    """Inputs, and the keyword arguments of the reference."""
    n, _, v = shape
    everything = options == "everything"
    inputs = head_inputs(*shape, dtype=dtype, device=DEVICE, bias=everything, ignored=everything)
    if options in ("rounded", "kept", "everything"):
        # Exact products and sums. Logits that differ in their last bit may round apart; and the
        # plain program of these options multiplies in fp32, where a GPU's matrix units add the
        # products of 16-bit operands less exactly, in every program that uses them.
        inputs.hidden.mul_(4.0).round_().div_(4.0)
        inputs.weight.mul_(16.0).round_().div_(16.0)
        if inputs.bias is not None:
            inputs.bias.mul_(8.0).round_().div_(8.0)
    kept_ids = kept_sets(inputs.targets, v)
    keywords = {
        "plain": {},
        "temperature": {"temperature": 0.7},
        "token_temperature": {"temperature": token_temperatures(n)},
        "softcap": {"softcap": 2.0},
        "rounded": {"round_logits": "fp16", "temperature": 0.7},
        "kept": {"kept_ids": kept_ids},
        "everything": {
            "temperature": token_temperatures(n),
            "softcap": 5.0,
            "round_logits": "bf16",
            "kept_ids": kept_ids,
        },
    }
    return inputs, keywords[options]


def forward(inputs: HeadInputs, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy) of the kernels."""
    return kernels.linear_logprobs_fwd(inputs.head(**options), with_entropy=True)


def backward(
    inputs: HeadInputs,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: dict[str, Any],
    output_mask: list[bool] = ALL,
    weight_grad: Tensor | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) of the kernels for upstream (dlogprobs, dlse, dentropy)."""
    lse, entropy = forward(inputs, options)[1:] if statistics is None else statistics
    head = inputs.head(**options)
    return kernels.linear_logprobs_bwd(
        Backward(Upstream(*upstream, lse, entropy), head, output_mask, weight_grad)
    )


def truth_forward(inputs: HeadInputs, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    bias = None if inputs.bias is None else inputs.bias.double()
    logprobs, entropy, lse = reference.linear_logprobs_with_stats(
        inputs.hidden.double(), inputs.weight.double(), inputs.targets, bias=bias, **options
    )
    return logprobs, lse, entropy


def plain_forward(inputs: HeadInputs, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    if "round_logits" in options or "kept_ids" in options:  # strictly: fp32 logits in every dtype
        logprobs, entropy, lse = reference.linear_logprobs_with_stats(
            inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options
        )
        return logprobs, lse, entropy
    return plain_linear_logprobs(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options
    )


def autograd_backward(
    function: Any, inputs: HeadInputs, upstream: tuple[Tensor | None, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """(dhidden, dweight, dbias) of truth_forward or plain_forward by autograd."""
    copy = inputs.in_dtype(inputs.hidden.dtype)
    results = function(copy, options)
    pairs = [
        (result, gradient.to(result.dtype))
        for result, gradient in zip(results, upstream, strict=True)
        if gradient is not None
    ]
    return torch.autograd.grad(
        [result for result, _ in pairs],
        copy.leaves,
        [gradient for _, gradient in pairs],
    )


def check_forward(inputs: HeadInputs, options: dict[str, Any]) -> None:
    for name, ours, truth, plain in zip(
        ("logprobs", "lse", "entropy"),
        forward(inputs, options),
        truth_forward(inputs, options),
        plain_forward(inputs, options),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        assert_close_to_truth(ours, truth, plain, name)


def check_backward(
    inputs: HeadInputs,
    options: dict[str, Any],
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> None:
    if upstream is None:
        c = inputs.coefficients
        upstream = (c, 0.3 * c.flip(0), 0.5 * c.roll(1))
    output_mask = [True, True, inputs.bias is not None]
    for name, ours, truth, plain in zip(
        ("dhidden", "dweight", "dbias"),
        backward(inputs, upstream, options, output_mask),
        autograd_backward(truth_forward, inputs.in_dtype(torch.float64), upstream, options),
        autograd_backward(plain_forward, inputs, upstream, options),
        strict=False,
    ):
        assert ours.dtype == inputs.hidden.dtype
        assert_close_to_truth(ours, truth, plain, name)


# --- Against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_forward_matches_float64(dtype: torch.dtype, options: str) -> None:
    check_forward(*case(options, ODD, dtype))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_backward_matches_float64(dtype: torch.dtype, options: str) -> None:
    check_backward(*case(options, ODD, dtype))


def misaligned(matrix: Tensor) -> Tensor:
    """The same numbers, beginning one element after a multiple of 16 bytes."""
    storage = matrix.new_empty(matrix.numel() + 1)
    return storage[1:].view_as(matrix).copy_(matrix)


def loads_by_descriptor(inputs: HeadInputs) -> bool:
    return launch.select_config("linear_logprobs_fwd", inputs.head()).descriptors


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_operands_without_a_descriptor_match_float64(dtype: torch.dtype) -> None:
    inputs, options = case("everything", ODD, dtype)
    if DEVICE == "cpu":
        assert loads_by_descriptor(inputs)
    inputs = replace(inputs, weight=misaligned(inputs.weight))
    assert not loads_by_descriptor(inputs)
    check_forward(inputs, options)
    check_backward(inputs, options)


def test_the_layout_of_hidden_does_not_change_a_result() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, dtype=torch.bfloat16)
    before = forward(inputs, {})
    for hidden in (misaligned(inputs.hidden), inputs.hidden.T.contiguous().T):
        assert not launch.has_aligned_rows(hidden)
        for result, expected in zip(
            forward(replace(inputs, hidden=hidden), {}), before, strict=True
        ):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(32, 32, 64), (37, 40, 131), (1, 40, 75), (2, 1, 3), (17, 7, 1)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    inputs = head_inputs(*shape, device=DEVICE)
    check_forward(inputs, {})
    check_backward(inputs, {})


@pytest.mark.parametrize(
    "given", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_backward_of_one_upstream_gradient(given: tuple[bool, bool, bool]) -> None:
    inputs, options = case("everything", ODD, torch.float32)
    dlogprobs, dlse, dentropy = (inputs.coefficients if asked else None for asked in given)
    check_backward(inputs, options, (dlogprobs, dlse, dentropy))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_on_a_gpu_at_the_size_of_its_tiles(
    dtype: torch.dtype, options: str, set_sizes: SetSizes
) -> None:
    set_sizes(head_gradients, DLOGITS_CHUNK_BYTES=512 * 4096 * 4, TOKEN_CHUNK=512)  # a few chunks
    for shape in ((1000, 520, 10007), (200, 4096, 5000)):  # a row of tiles.py each
        check_forward(*case(options, shape, dtype))
        check_backward(*case(options, shape, dtype))


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


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_targets_outside_the_kept_set(softcap: float | None) -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    options = {} if softcap is None else {"softcap": softcap}
    options["kept_ids"] = (inputs.targets[:, None] + torch.arange(1, 6, device=DEVICE)) % ODD[2]
    options["kept_ids"][::4, 2] = inputs.targets[::4]
    options["kept_ids"][3] = -1
    logprobs, _, _ = forward(inputs, options)
    outside = (options["kept_ids"] != inputs.targets[:, None]).all(1)
    outside[3] = False
    assert outside.any() and (logprobs[outside] == float("-inf")).all()
    assert logprobs[~outside].isfinite().all()
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
    before, _, _ = forward(inputs, {})
    inputs.targets[4] = target
    logprobs, _, _ = forward(inputs, {})
    assert logprobs[4].isnan()
    logprobs[4] = before[4]
    assert torch.equal(logprobs, before)
    upstream = (inputs.coefficients, None, None)
    dhidden, _, _ = backward(inputs, upstream, {}, [True, False, False])
    assert dhidden[4].isnan().all() and int(dhidden.isnan().any(1).sum()) == 1


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


def test_rows_that_do_not_count_cost_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = head_inputs(*ODD, device=DEVICE, ignored=True)
    inputs.coefficients[::2] = 0
    counted = int((inputs.targets != -100).sum())
    live = int(((inputs.targets != -100) & (inputs.coefficients != 0)).sum())
    assert live < counted < ODD[0]
    rows: list[int] = []
    arguments_of = launch.gemm_arguments

    def recorded(config: configs.TileConfig, head: Head) -> dict[str, object]:
        rows.append(head.hidden.shape[0])
        return arguments_of(config, head)

    for module in (kernels, head_gradients):
        monkeypatch.setattr(module, "gemm_arguments", recorded)
    _, lse, entropy = forward(inputs, {})
    assert sum(rows) == counted
    rows.clear()
    backward(inputs, (inputs.coefficients, None, None), {}, statistics=(lse, entropy))
    assert sum(rows) == live


def test_results_of_counted_rows_are_those_without_the_others() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, ignored=True, dtype=torch.bfloat16)
    counted = inputs.targets != -100
    alone = HeadInputs(
        inputs.hidden[counted], inputs.weight, inputs.targets[counted], None,
        inputs.coefficients[counted],
    )  # fmt: skip
    ours = *forward(inputs, {}), backward(inputs, (inputs.coefficients,) * 3, {})[0]
    expected = *forward(alone, {}), backward(alone, (alone.coefficients,) * 3, {})[0]
    for result, expectation in zip(ours, expected, strict=True):
        assert torch.equal(result[counted], expectation)


def test_rows_are_masked_where_waiting_for_their_number_is_impossible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, options = case("everything", ODD, torch.float16)
    inputs.coefficients[::2] = 0
    inputs.hidden[::2] = float("nan")
    upstream = (inputs.coefficients,) * 3
    lse, entropy = forward(inputs, options)[1:]

    def results() -> tuple[Tensor, ...]:
        return (
            *(result[1::2] for result in forward(inputs, options)),
            *backward(inputs, upstream, options, statistics=(lse, entropy)),
        )

    gathered = results()
    monkeypatch.setattr(launch, "waiting_is_possible", lambda device: False)
    monkeypatch.setattr(Tensor, "nonzero", None)
    truth_dtype = torch.float64
    for result, expected in zip(results(), gathered, strict=True):
        # The library's GEMMs sum over another number of rows.
        assert_close_to_truth(result, expected.to(truth_dtype), expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or ROCm device")
def test_inside_a_cuda_graph() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, ignored=True)
    upstream = (inputs.coefficients, None, None)

    def work() -> tuple[Tensor, ...]:
        logprobs, lse, entropy = forward(inputs, {})
        return logprobs, *backward(inputs, upstream, {}, statistics=(lse, entropy))

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    graph.replay()
    for result, expectation in zip(results, expected, strict=True):
        assert_close_to_truth(result, expectation.double(), expectation)


# --- weight_grad ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_weight_grad_is_added_to(dtype: torch.dtype, options: str) -> None:
    inputs, keywords = case(options, ODD, dtype)
    _, d, v = ODD
    before = torch.randn(v, d, device=DEVICE)
    total = before.clone()
    upstream = (inputs.coefficients, None, 0.5 * inputs.coefficients)
    ours = backward(inputs, upstream, keywords, weight_grad=total)
    expected = backward(inputs, upstream, keywords)
    assert ours[1].shape == (0,)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2])
    truth = autograd_backward(truth_forward, inputs.in_dtype(torch.float64), upstream, keywords)[1]
    plain = autograd_backward(plain_forward, inputs, upstream, keywords)[1]
    assert_close_to_truth(total, before.double() + truth, before + plain)


def test_weight_grad_of_fp16_is_unscaled() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, dtype=torch.float16)
    upstream = (inputs.coefficients, None, None)
    truth = autograd_backward(truth_forward, inputs.in_dtype(torch.float64), upstream, {})[1]
    plain = autograd_backward(plain_forward, inputs, upstream, {})[1]
    total = torch.zeros(ODD[2], ODD[1], device=DEVICE)
    tiny = (inputs.coefficients * 2.0**-16, None, None)
    backward(inputs, tiny, {}, [False, True, False], weight_grad=total)
    assert_close_to_truth(total * 2.0**16, truth, plain)


def test_weight_grad_of_a_frozen_weight_stays() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    total = torch.ones(ODD[2], ODD[1], device=DEVICE)
    upstream = (inputs.coefficients, None, None)
    backward(inputs, upstream, {}, [True, False, False], weight_grad=total)
    assert (total == 1).all()
    backward(inputs, (None, None, None), {}, weight_grad=total)
    assert (total == 1).all()


def test_fp16_gradients_do_not_underflow() -> None:
    inputs = head_inputs(*ODD, device=DEVICE, dtype=torch.float16)
    inputs.hidden.mul_(2.0**-6)
    inputs.weight.mul_(2.0**6)  # the same logits; dhidden is far from fp16's smallest number
    upstream = (inputs.coefficients, None, None)
    truth = autograd_backward(truth_forward, inputs.in_dtype(torch.float64), upstream, {})
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

    def counted(total: Tensor, a: Tensor, b: Tensor, *, keep: bool) -> None:
        products.append(a.shape)
        gemm.add_product(total, a, b, keep=keep)

    monkeypatch.setattr(head_gradients, "add_product", counted)
    ours = backward(inputs, (inputs.coefficients, None, None), {}, output_mask)
    chunks = -(-ODD[2] // 32) * -(-ODD[0] // 16) if DEVICE == "cpu" else len(products)
    assert len(products) == (chunks if any(output_mask) else 0)
    for our, whole, asked in zip(ours, everything, output_mask, strict=True):
        assert torch.equal(our, whole) if asked else our.shape == (0,)


@pytest.mark.parametrize("at_once", [None, 132])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [1, 1000, 8192, 32768, 40000, 131072, 1000003])
def test_chunks_are_within_their_limits(
    tokens: int, itemsize: int, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    config = configs.select("linear_logprobs_bwd", "sm90", itemsize, 4096)
    rows, columns = head_gradients.chunk_shape(tokens, 128256, itemsize, config, at_once)
    assert columns <= head_gradients.COLUMN_CHUNK
    assert rows * columns * itemsize <= head_gradients.DLOGITS_CHUNK_BYTES
    assert columns % config.block_v == 0
    assert rows == tokens or rows % config.block_n == 0
    assert rows <= head_gradients.TOKEN_CHUNK
    # Few and large products: no chunk is narrow, and the last one of the tokens is not either.
    assert columns * itemsize >= 16384
    assert tokens % rows == 0 or tokens % rows > rows // 2


@pytest.mark.parametrize("tiles_per_split", [1, 2, 3])
def test_every_cut_of_the_vocabulary_matches_float64(
    tiles_per_split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_splits = -(-3 // tiles_per_split)  # of the three tiles of 75 entries
    monkeypatch.setattr(configs, "split_vocabulary", lambda *_: (tiles_per_split, num_splits))
    check_forward(*case("everything", ODD, torch.bfloat16))


def test_how_many_programs_run_at_once_does_not_change_the_weights_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of its rows is in one chunk of columns, whatever that is; dhidden's sums are others."""
    inputs, options = case("everything", ODD, torch.bfloat16)
    upstream = (inputs.coefficients,) * 3
    before = backward(inputs, upstream, options)
    asked = []

    def chosen(num_tiles: int, row_blocks: int, most: int, at_once: int) -> int:
        asked.append((num_tiles, row_blocks, most, at_once))
        return 1

    monkeypatch.setattr(configs, "whole_waves", chosen)
    monkeypatch.setattr(head_gradients, "programs_at_once", lambda *_: 5)
    monkeypatch.setattr(head_gradients, "DLOGITS_CHUNK_BYTES", 2 * 16 * 64)  # two tiles
    _, dweight, dbias = backward(inputs, upstream, options)
    assert asked == [(3, 1, 2, 5)]
    assert torch.equal(dweight, before[1]) and torch.equal(dbias, before[2])
    check_backward(inputs, options)


def test_a_row_does_not_depend_on_the_batch_it_is_in() -> None:
    inputs, options = case("everything", ODD, torch.bfloat16)
    whole = forward(inputs, options)
    for rows in ([20], [18, 2, 5, 20], list(range(3, 21)), [0, *range(21), 7]):
        part = HeadInputs(
            inputs.hidden[rows], inputs.weight, inputs.targets[rows], inputs.bias,
            inputs.coefficients[rows],
        )  # fmt: skip
        of_part = {
            name: value[rows] if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        for result, expected in zip(forward(part, of_part), whole, strict=True):
            assert torch.equal(result, expected[rows])


def test_a_worker_thread_gets_the_same_result() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    upstream = (inputs.coefficients, None, None)
    results: list[tuple[Tensor, ...]] = []
    work = threading.Thread(
        target=lambda: results.append((*forward(inputs, {}), *backward(inputs, upstream, {})))
    )
    work.start()
    work.join()
    expected = *forward(inputs, {}), *backward(inputs, upstream, {})
    for result, expectation in zip(results[0], expected, strict=True):
        assert torch.equal(result, expectation)


def test_repeat_is_bitwise_equal() -> None:
    inputs, options = case("everything", ODD, torch.bfloat16)
    first, second = (
        (
            *forward(inputs, options),
            *backward(inputs, (inputs.coefficients,) * 3, options),
        )
        for _ in range(2)
    )
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
    check_forward(strided, {})
    check_backward(strided, {})
    as_given = replace(strided, weight=inputs.weight)
    for result, expected in zip(forward(as_given, {}), forward(inputs, {}), strict=True):
        assert torch.equal(result, expected)


def test_no_tokens() -> None:
    inputs = head_inputs(0, 40, 75, device=DEVICE, bias=True)
    for result in forward(inputs, {}):
        assert result.shape == (0,)
    dhidden, dweight, dbias = backward(inputs, (inputs.coefficients, None, None), {})
    assert dhidden.shape == (0, 40)
    assert dweight.shape == (75, 40) and (dweight == 0).all()
    assert dbias.shape == (75,) and (dbias == 0).all()


def test_entropy_is_empty_unless_asked_for() -> None:
    inputs = head_inputs(*ODD, device=DEVICE)
    logprobs, lse, entropy = kernels.linear_logprobs_fwd(inputs.head(), with_entropy=False)
    assert entropy.shape == (0,)
    assert torch.equal(logprobs, forward(inputs, {})[0]) and torch.equal(
        lse, forward(inputs, {})[1]
    )


# --- Kept logits ----------------------------------------------------------------------------------


@pytest.fixture
def small_kept_tiles(set_sizes: SetSizes) -> None:
    """Half a tile of the interpreter's kernels each."""
    set_sizes(kept_logits, CPU_TILE=16, CPU_STEP=32, GPU_TILE=16, GPU_STEP=32)


def kept_room(inputs: HeadInputs, columns: int) -> KeptLogits:
    """Room for so many columns, a multiple of 32."""
    n, tiles = inputs.hidden.shape[0], -(-columns // 16)
    nan = float("nan")
    return KeptLogits(
        torch.full((n, columns), nan, dtype=torch.float16, device=DEVICE),
        torch.full((n, tiles), nan, device=DEVICE),
    )


def exact_gradients(
    inputs: HeadInputs, upstream: tuple[Tensor | None, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """(dhidden, dweight, dbias) in float64."""
    return autograd_backward(truth_forward, inputs.in_dtype(torch.float64), upstream, options)


def check_kept(
    inputs: HeadInputs,
    upstream: tuple[Tensor | None, ...],
    options: dict[str, Any],
    gradients: tuple[Tensor, ...],
) -> None:
    truth = exact_gradients(inputs, upstream, options)
    plain = autograd_backward(plain_forward, inputs, upstream, options)
    for ours, true, other in zip(gradients, truth, plain, strict=False):
        assert ours.isfinite().all()
        assert_close_to_truth(ours, true, other)


@pytest.mark.usefixtures("small_kept_tiles")
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("options", ["plain", "temperature", "token_temperature", "softcap"])
def test_gradients_of_kept_logits(options: str, dtype: torch.dtype, columns: int) -> None:
    """By the law, with rows ignored in one pass or in both; of bf16 as exact as without."""
    inputs, keywords = case(options, ODD, dtype)
    targets = inputs.targets.clone()
    targets[5:9] = -100
    inputs = replace(inputs, targets=targets)
    room = kept_room(inputs, columns)
    results = kernels.linear_logprobs_fwd(inputs.head(**keywords), True, room)
    for ours, without in zip(results, forward(inputs, keywords), strict=True):
        assert torch.equal(ours, without)
    counted = targets != -100
    assert room.logits[counted].isfinite().all() and room.maxima[counted].isfinite().all()
    assert (room.logits[counted] <= 0).all()
    assert room.logits[~counted].isnan().all()  # nobody's business

    later = targets.clone()
    later[10:14] = -100
    inputs = replace(inputs, targets=later)
    c = inputs.coefficients
    upstream = c, c.cos(), 0.3 * c.flip(0)
    arguments = Backward(Upstream(*upstream, *results[1:]), inputs.head(**keywords), ALL)
    kept = kernels.linear_logprobs_bwd(arguments._replace(kept_logits=room))
    again = kernels.linear_logprobs_bwd(arguments)
    check_kept(inputs, upstream, keywords, kept)
    if dtype == torch.bfloat16:  # in fp16 logits made again are better than what is kept of them
        truth = exact_gradients(inputs, upstream, keywords)
        for ours, theirs, true in zip(kept[:2], again[:2], truth[:2], strict=True):
            assert (ours.double() - true).norm() <= 1.05 * (theirs.double() - true).norm()
    assert (kept[0][later == -100] == 0).all()


@pytest.mark.usefixtures("small_kept_tiles")
def test_kept_banned_tokens() -> None:
    """-inf below the maximum would make the entropy's gradient NaN."""
    inputs = head_inputs(*ODD, dtype=torch.bfloat16, device=DEVICE, bias=True)
    assert inputs.bias is not None
    inputs.bias[:40] = -torch.inf
    inputs.bias[50::2] = -torch.inf
    inputs = replace(inputs, targets=torch.full_like(inputs.targets, 45))
    room = kept_room(inputs, 64)
    _, lse, entropy = kernels.linear_logprobs_fwd(inputs.head(), True, room)
    c = inputs.coefficients
    upstream = Upstream(c, None, c, lse, entropy)
    arguments = Backward(upstream, inputs.head(), ALL, kept_logits=room)
    check_kept(inputs, (c, None, c), {}, kernels.linear_logprobs_bwd(arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_dweight_of_one_chunk_of_tokens_has_the_bits_of_an_fp32_sum(
    dtype: torch.dtype, set_sizes: SetSizes
) -> None:
    """Of bf16 the product rounds it; of fp16, whose gradients are scaled, a buffer is between."""
    set_sizes(head_gradients, TOKEN_CHUNK=512)
    inputs = head_inputs(*ODD, dtype=dtype, device=DEVICE)
    upstream = inputs.coefficients, None, None
    _, dweight, _ = backward(inputs, upstream, {})
    total = torch.zeros(75, 40, device=DEVICE)
    backward(inputs, upstream, {}, weight_grad=total)
    assert torch.equal(dweight, total.to(dtype))


@pytest.mark.parametrize("chosen", [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_rounded_product_puts_the_users_switches_back(
    dtype: torch.dtype, chosen: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(partial sums in 16 bits, split sums), a pair for each 16-bit dtype."""
    backend = torch.backends.cuda.matmul
    switches = {
        torch.bfloat16: "allow_bf16_reduced_precision_reduction",
        torch.float16: "allow_fp16_reduced_precision_reduction",
    }
    if not hasattr(backend, "allow_bf16_reduced_precision_reduction_split_k"):
        pytest.skip("this torch has single switches")

    def pairs() -> dict[torch.dtype, tuple[bool, bool]]:
        return {
            dtype: (getattr(backend, name), getattr(backend, f"{name}_split_k"))
            for dtype, name in switches.items()
        }

    product, seen, before = torch.mm, [], pairs()

    def watched(*args: Tensor, out: Tensor) -> Tensor:
        seen.append(pairs())
        return product(*args, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    a, b = torch.ones(3, 4, dtype=dtype), torch.ones(4, 5, dtype=dtype)
    result = torch.empty(3, 5, dtype=dtype)
    try:
        for name in switches.values():
            setattr(backend, name, chosen)
        gemm.rounded_product(result, a, b)
        after = pairs()
    finally:
        for other, name in switches.items():
            setattr(backend, name, before[other])
    assert torch.equal(result, torch.full((3, 5), 4.0, dtype=dtype))
    assert seen == [{x: (False, chosen[1]) if x == dtype else chosen for x in switches}]
    assert after == dict.fromkeys(switches, chosen)
