"""Prediction, not measurement: how long the head kernels should take on GPUs that are not here.

    python -m benchmarks.predict.cost_model [--device "H100 SXM" ...] [--head llama3-8b ...]
        [--tokens 8192 ...] [--efficiency 1.0] [--results FOLDER]

Prints predicted times and memory; writes cost_model.csv and a plot for each head.

Question: with perfect kernels, what do the fused and the materialised head cost in time and memory,
and what bounds them? Every kernel of a form is written down with the FLOP, bytes and exponentials
that its shapes demand; a device is its datasheet. Assumptions:

* A kernel takes the longest of FLOP / matrix rate, bytes / memory bandwidth and exponentials /
  exponential rate: inside a kernel the three overlap perfectly. Where nothing overlaps it takes
  their sum (predicted_ms_no_overlap): a real kernel lies between or above. Kernels follow one
  another without overlap and without launch gaps.
* --efficiency is the share of the matrix rate that a GEMM reaches. 1.0 is the roofline, which no
  kernel reaches: large bf16 GEMMs of libraries reach about 0.6 to 0.8. Bandwidth and exponentials
  are taken in full.
* A GEMM reads each operand from memory once. The weight is read again for every group of row
  blocks, thousands of rows each, which is thousands of FLOP a byte; all devices here are bound by
  memory below 400 only.
* Matrix products are bf16 with fp32 accumulation. Reductions in registers, the tile's target, the
  row-sized inputs and the merge's latency cost nothing. Entropy adds no product and no exponential.
* Boost clocks hold. Under full matrix load GPUs clock lower.

The forms are those of benchmarks.head.providers.base. Fused, their products of 2 N D V FLOP are
FORM_GEMMS' (1, 4, 3 and 3). Materialised is plain torch as in benchmarks.head.providers.plain_torch
(F.linear in bf16, float(), softcap, log_softmax, gather): it stores the logits, which the fused
backward recomputes, and needs one product fewer.
Extra memory is the peak beyond inputs and results (logprobs, gradients). Chunks of the vocabulary
and of the tokens are those that the launchers of agro_kernels._triton choose for the architecture.

Letters: N tokens, D hidden size, V vocabulary.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from matplotlib.figure import Figure

from agro_kernels import tiles
from agro_kernels._triton.head_gradients import chunk_shape
from agro_kernels._triton.linear_logprobs import TOKEN_CHUNK
from agro_train.plan.machine import DATASHEETS, Datasheet
from agro_train.watch import style
from benchmarks.head.providers.base import FORM_GEMMS, FORMS
from benchmarks.measure.rows import RESULTS
from benchmarks.measure.shapes import GPU_HEADS, GPU_TOKENS, HEADS, Shape

TITLE = "prediction by a roofline model, not a measurement"
TOKENS = tuple(n for n in GPU_TOKENS if n >= 4096)
IMPLEMENTATIONS = ("fused", "materialised")
BF16, FP32 = 2, 4  # bytes of an element
# A softcap's tanh is an exponential and a reciprocal, both by the special-function unit.
SOFTCAP_EXPS = 2


# --- Devices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """One accelerator, by its datasheet.

    Exponentials: units (SMs or compute units) times results a clock and unit times boost clock.
    """

    name: str
    architecture: str  # a key of tiles.TILES, which says how the kernels cut their work
    sheet: Datasheet
    units: int
    exps_per_clock: int  # a unit's
    clock: float  # Hz, at which the matrix rate is quoted
    source: str

    @property
    def exps(self) -> float:
        """Exponentials a second."""
        return self.units * self.exps_per_clock * self.clock


# Results a clock and SM of the special-function units: CUDA C++ Programming Guide, section
# "Throughput of native arithmetic instructions", row "base 2 exponential", columns 8.0, 9.0, 10.0.
NVIDIA_EXPS = 16
# Assumed: a quarter of the ordinary rate of 64 lanes, as GCN's transcendental instructions (16
# clocks a wave of 64 on each of 4 SIMDs). CDNA 4 may be faster; no bound here depends on it.
AMD_EXPS = 16

H100 = Device("H100 SXM", "sm90", DATASHEETS["h100"], 132, NVIDIA_EXPS, 1.83e9,
              "NVIDIA H100 datasheet; clock from the Hopper white paper")  # fmt: skip
DEVICES = (
    Device("A100 SXM", "sm80", DATASHEETS["a100"], 108, NVIDIA_EXPS, 1.41e9,
           "NVIDIA A100 80GB datasheet"),
    H100,
    replace(H100, name="H200 SXM", sheet=DATASHEETS["h200"],
            source="NVIDIA H200 datasheet; the chip of H100"),
    Device("B200", "sm100", DATASHEETS["b200"], 148, NVIDIA_EXPS, 1.86e9,
           "NVIDIA HGX B200 datasheet; clock from 8192 FLOP a clock and SM"),
    Device("MI300X", "gfx942", DATASHEETS["mi300x"], 304, AMD_EXPS, 2.1e9,
           "AMD Instinct MI300X datasheet"),
    Device("MI355X", "gfx950", DATASHEETS["mi355x"], 256, AMD_EXPS, 2.4e9,
           "AMD Instinct MI355X datasheet"),
)  # fmt: skip


# --- Kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """What one kernel, or one sort of kernel over all chunks, has to do."""

    name: str
    gemms: int = 0  # matrix products of the head, whole
    flop: float = 0.0  # of them; a multiplication and an addition are two
    bytes: float = 0.0  # to and from memory
    exps: float = 0.0  # results of the special-function unit

    def limits(self, device: Device, efficiency: float = 1.0) -> dict[str, float]:
        """Seconds that each resource needs."""
        return {
            "matrix": self.flop / (device.sheet.bfloat16 * efficiency),
            "memory": self.bytes / device.sheet.bandwidth,
            "exp": self.exps / device.exps,
        }

    def seconds(self, device: Device, efficiency: float = 1.0) -> float:
        return max(self.limits(device, efficiency).values())

    def bound(self, device: Device, efficiency: float = 1.0) -> str:
        limits = self.limits(device, efficiency)
        return max(limits, key=lambda name: limits[name])


def gemm(name: str, shape: Shape, bytes: float, exps: float = 0.0) -> Kernel:
    return Kernel(name, 1, shape.gemm_flop(), bytes, exps)


def sizes(shape: Shape) -> tuple[int, int, int]:
    """Elements of logits (N, V), hidden (N, D) and weight (V, D)."""
    n, d, v = shape.tokens, shape.head.hidden_size, shape.head.vocabulary
    return n * v, n * d, v * d


def kernels(implementation: str, form: str, shape: Shape, architecture: str) -> list[Kernel]:
    """The kernels of one form, in their order."""
    if implementation == "fused":
        forward = fused_forward(shape, architecture)
        backward = fused_gradients(shape, architecture)
    else:
        forward, backward = materialised_forward(shape), materialised_backward(shape)
    if form == "forward":
        return forward
    if form == "known_coefficients" and implementation == "fused":
        return backward  # with the lse of an earlier pass
    return forward + [
        kernel for kernel in backward if kernel.name != "dweight" or "dweight" in FORM_GEMMS[form]
    ]


def fused_forward(shape: Shape, architecture: str) -> list[Kernel]:
    logits, hidden, weight = sizes(shape)
    statistics = statistics_bytes(shape, architecture)
    exps = logits * (1 + SOFTCAP_EXPS * bool(shape.head.softcap))
    return [
        gemm("logprobs", shape, BF16 * (hidden + weight) + statistics, exps),
        Kernel("merge of splits", bytes=statistics + FP32 * 2 * shape.tokens),
    ]


def statistics_bytes(shape: Shape, architecture: str) -> int:
    """Of the maximum and the sum of each token and split of V, and its target's logit."""
    return FP32 * (splits_numbers(shape, architecture) + 1) * shape.tokens


def splits_numbers(shape: Shape, architecture: str) -> int:
    """Of a token: two for each split of the vocabulary."""
    tile = tile_of("linear_logprobs_fwd", shape, architecture)
    at_once = tiles.programs_at_once(architecture, BF16, tile)
    head = shape.head
    return 2 * tiles.split_vocabulary(head.vocabulary, head.hidden_size, tile, at_once)[1]


def tile_of(kernel: str, shape: Shape, architecture: str) -> tiles.TileConfig:
    softcap = shape.head.softcap is not None
    return tiles.select(kernel, architecture, BF16, shape.head.hidden_size, softcap=softcap)


def fused_gradients(shape: Shape, architecture: str) -> list[Kernel]:
    """The gradient of the logits, written chunk by chunk, and the two products with it."""
    logits, hidden, weight = sizes(shape)
    chunk_n, chunk_v = dlogits_chunk(shape, architecture)
    chunks_n, chunks_v = -(-shape.tokens // chunk_n), -(-shape.head.vocabulary // chunk_v)
    # Each chunk of hidden meets each chunk of the weight, in all three products.
    operands = BF16 * (chunks_v * hidden + chunks_n * weight)
    exps = logits * (1 + SOFTCAP_EXPS * bool(shape.head.softcap))
    return [
        gemm("dlogits", shape, operands + BF16 * logits, exps),
        gemm(  # added to an fp32 (N, D) for each vocabulary chunk, rounded in the end
            "dhidden",
            shape,
            BF16 * (logits + chunks_n * weight)
            + FP32 * 2 * chunks_v * hidden
            + (FP32 + BF16) * hidden,
        ),
        gemm(  # rounded at once; of several token chunks, added to an fp32 (chunk, D) for each
            "dweight",
            shape,
            BF16 * (logits + chunks_v * hidden + weight)
            + (chunks_n > 1) * FP32 * (2 * chunks_n + 1) * weight,
        ),
    ]


def dlogits_chunk(shape: Shape, architecture: str) -> tuple[int, int]:
    """(tokens, vocabulary entries) of a chunk of the gradient of the logits."""
    tile = tile_of("linear_logprobs_bwd", shape, architecture)
    at_once = tiles.programs_at_once(architecture, BF16, tile)
    return chunk_shape(shape.tokens, shape.head.vocabulary, BF16, tile, at_once)


def materialised_forward(shape: Shape) -> list[Kernel]:
    logits, hidden, weight = sizes(shape)
    steps = [
        gemm("logits", shape, BF16 * (hidden + weight + logits)),
        Kernel("float", bytes=(BF16 + FP32) * logits),
    ]
    if shape.head.softcap is not None:  # a division, a tanh, a product, each over memory
        steps.append(Kernel("softcap", bytes=FP32 * 6 * logits, exps=SOFTCAP_EXPS * logits))
    # Rows this long do not fit on chip: torch reads them for the maximum, the sum, the result.
    steps.append(Kernel("log_softmax", bytes=FP32 * 4 * logits, exps=logits))
    return steps


def materialised_backward(shape: Shape) -> list[Kernel]:
    logits, hidden, weight = sizes(shape)
    steps = [
        Kernel("dgather", bytes=FP32 * logits),  # zeros, and one element a row
        # Reads the gradient for its sum, then gradient and log-probabilities; writes the result.
        Kernel("dlog_softmax", bytes=FP32 * 4 * logits, exps=logits),
    ]
    if shape.head.softcap is not None:  # a product, the slope (two operands), a division
        steps.append(Kernel("dsoftcap", bytes=FP32 * 7 * logits))
    return [
        *steps,
        Kernel("dfloat", bytes=(FP32 + BF16) * logits),
        gemm("dhidden", shape, BF16 * (logits + weight + hidden)),
        gemm("dweight", shape, BF16 * (logits + hidden + weight)),
    ]


def extra_bytes(implementation: str, form: str, shape: Shape, architecture: str) -> int:
    """Peak memory beyond inputs and results.

    Materialised, in fp32 (N, V) tensors alive at once: logits and log-probabilities in the forward
    pass, log-probabilities and the gradients of both in the backward; with a softcap one more,
    what the tanh was made of or gave.
    """
    logits, hidden, _ = sizes(shape)
    if implementation == "materialised":
        alive = (2 if form == "forward" else 3) + bool(shape.head.softcap)
        return FP32 * alive * logits
    if form == "forward":
        at_once = min(shape.tokens, TOKEN_CHUNK)
        return FP32 * (splits_numbers(shape, architecture) * at_once + shape.tokens)
    chunk_n, chunk_v = dlogits_chunk(shape, architecture)
    summed = "dweight" in FORM_GEMMS[form] and chunk_n < shape.tokens
    weight_sums = FP32 * chunk_v * shape.head.hidden_size if summed else 0
    lse = 0 if form == "known_coefficients" else FP32 * shape.tokens
    return BF16 * chunk_n * chunk_v + FP32 * hidden + weight_sums + lse


# --- Table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One prediction. fraction_of_peak counts every FLOP of the form's `gemms` products."""

    kind: str  # always TITLE: a row cannot be taken for a measurement
    device: str
    head: str
    form: str
    implementation: str
    tokens: int
    hidden_size: int
    vocabulary: int
    efficiency: float
    gemms: int
    tflop: float
    gigabytes: float
    gigaexps: float
    predicted_ms: float
    predicted_ms_no_overlap: float
    fraction_of_peak: float
    bound: str  # of the kernels that take most of the time
    extra_memory_gb: float  # 1e9 bytes
    fits: bool  # inputs, gradients and extra memory in the device's memory
    source: str  # of the device's rates


def predict(
    device: Device, form: str, implementation: str, shape: Shape, efficiency: float = 1.0
) -> Row:
    steps = kernels(implementation, form, shape, device.architecture)
    seconds = sum(step.seconds(device, efficiency) for step in steps)
    flop = sum(step.flop for step in steps)
    by_bound = dict.fromkeys(("matrix", "memory", "exp"), 0.0)
    for step in steps:
        by_bound[step.bound(device, efficiency)] += step.seconds(device, efficiency)
    extra = extra_bytes(implementation, form, shape, device.architecture)
    _, hidden, weight = sizes(shape)
    gradients = ("dhidden" in FORM_GEMMS[form]) * hidden + ("dweight" in FORM_GEMMS[form]) * weight
    return Row(
        kind=TITLE,
        device=device.name,
        head=shape.head.name,
        form=form,
        implementation=implementation,
        tokens=shape.tokens,
        hidden_size=shape.head.hidden_size,
        vocabulary=shape.head.vocabulary,
        efficiency=efficiency,
        gemms=sum(step.gemms for step in steps),
        tflop=flop / 1e12,
        gigabytes=sum(step.bytes for step in steps) / 1e9,
        gigaexps=sum(step.exps for step in steps) / 1e9,
        predicted_ms=1e3 * seconds,
        predicted_ms_no_overlap=1e3
        * sum(sum(step.limits(device, efficiency).values()) for step in steps),
        fraction_of_peak=flop / (seconds * device.sheet.bfloat16),
        bound=max(by_bound, key=lambda name: by_bound[name]),
        extra_memory_gb=extra / 1e9,
        fits=BF16 * (hidden + weight + gradients) + extra <= device.sheet.memory,
        source=device.source,
    )


def print_tables(rows: list[Row], tokens: list[int]) -> None:
    """Predicted times of each device and the memory of the first, one column a length."""
    columns = "".join(f"{f'N={n}':>12}" for n in tokens)
    cells = {(r.device, r.head, r.form, r.implementation, r.tokens): r for r in rows}
    for device in dict.fromkeys(row.device for row in rows):
        print(f"\n{device}, ms, {TITLE}; * does not fit its memory")
        print(f"{'head':<14}{'form':<20}{'implementation':<14}{'gemms':>6}{columns}")
        for head, form, implementation in lines_of(rows):
            line = [cells[device, head, form, implementation, n] for n in tokens]
            numbers = "".join(f"{r.predicted_ms:11.2f}{' ' if r.fits else '*'}" for r in line)
            print(f"{head:<14}{form:<20}{implementation:<14}{line[0].gemms:>6}{numbers}")
    # Tiles of other architectures change the extra memory in the third digit.
    print(f"\nExtra memory on {rows[0].device}, GB (1e9 bytes), {TITLE}")
    print(f"{'head':<14}{'form':<20}{'implementation':<20}{columns}")
    for head, form, implementation in lines_of(rows):
        line = [cells[rows[0].device, head, form, implementation, n] for n in tokens]
        numbers = "".join(f"{r.extra_memory_gb:12.3f}" for r in line)
        print(f"{head:<14}{form:<20}{implementation:<20}{numbers}")


def lines_of(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(head, form, implementation) of the rows, each once, in their order."""
    return list(dict.fromkeys((row.head, row.form, row.implementation) for row in rows))


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})


def plot(rows: list[Row], head: str, path: Path) -> None:
    """Time and memory of forward and backward against N; fused full, materialised dashed."""
    chosen = [row for row in rows if row.head == head and row.form == "forward_backward"]
    style.save(_drawn(chosen), path)


@style.sheet()
def _drawn(chosen: Sequence[Row]) -> Figure:
    devices = list(dict.fromkeys(row.device for row in chosen))
    lengths = sorted({row.tokens for row in chosen})
    figure, (time, memory) = style.panels(2, columns=1, row=3.6)
    figure.suptitle(f"{chosen[0].head}, forward and backward: {TITLE}", wrap=True)
    for implementation, stroke in zip(IMPLEMENTATIONS, ("-", "--"), strict=True):
        for i, device in enumerate(devices):
            line = [r for r in chosen if (r.device, r.implementation) == (device, implementation)]
            look = style.curve(i) | {"linestyle": stroke}
            label = device if implementation == "fused" else None
            time.plot(lengths, [row.predicted_ms for row in line], label=label, **look)
        gigabytes = [row.extra_memory_gb for row in line]  # of the last; nearly the same for all
        look = {"color": style.OURS, "linestyle": stroke}
        memory.plot(lengths, gigabytes, label=implementation, **look)
    of_memory: dict[float, list[str]] = {}
    for known in DEVICES:
        if known.name in devices:
            of_memory.setdefault(known.sheet.memory, []).append(known.name)
    for size, names in sorted(of_memory.items()):
        ends = [lengths[0], lengths[-1]]
        label = f"{', '.join(names)} has {size / 1e9:.0f}"
        memory.plot(ends, [size / 1e9] * 2, color=style.GREY, linewidth=1.0, label=label)
    for axes, title in ((time, "predicted time, ms"), (memory, "predicted extra memory, GB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens N", title=title)
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.xaxis.minorticks_off()
    style.finish(figure, note="solid: fused, dashed: materialised")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Predicts, prints, and writes the CSV and the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [device.name for device in DEVICES]
    parser.add_argument("--device", nargs="+", choices=names, default=names)
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(GPU_HEADS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument(
        "--efficiency",
        type=float,
        default=1.0,
        help="share of the datasheet's matrix rate that a GEMM reaches; 1.0 is the roofline",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not 0.0 < options.efficiency <= 1.0:
        parser.error(f"--efficiency: expected a share in (0, 1], got {options.efficiency}")
    rows = [
        predict(device, form, implementation, Shape(name, n, HEADS[name]), options.efficiency)
        for device in DEVICES
        if device.name in options.device
        for name in options.head
        for form in FORMS
        for implementation in IMPLEMENTATIONS
        for n in options.tokens
    ]
    print_tables(rows, options.tokens)
    options.results.mkdir(parents=True, exist_ok=True)
    write_csv(rows, options.results / "cost_model.csv")
    for name in options.head:
        plot(rows, name, options.results / f"cost_model_{name}.png")
    print(f"\nwritten to {options.results}: cost_model.csv and a plot for each head")


if __name__ == "__main__":
    main()
