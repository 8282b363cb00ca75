"""RUN/report.html: curves, configuration, environment and completions of a run, on one page.

The page stands alone: no file or address outside it is read, so that it can be mailed or attached.
What is on it is gathered here; report.html.j2 says how it looks.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.ticker import MaxNLocator

from agro_train import durable
from agro_train.config import TrainConfig
from agro_train.data.rollout_log import read_rollouts
from agro_train.data.rows import read_jsonl
from agro_train.run_folder import RunFolder
from agro_train.types import Rollout
from agro_train.watch import style
from agro_train.watch.display import best_and_worst, reward_text
from agro_train.watch.environment import read_starts
from agro_train.watch.panels import ALSO_ON_THE_PAGE, PANELS, Panel, numbered, points, waiting
from agro_train.watch.plots import read_yaml

STEPS_SHOWN = 12  # steps whose completions are on the page, spread evenly over the run
COMPLETIONS_SHOWN = 3  # best, worst and random ones of each of them
HELD_OUT_SHOWN = 6  # prompts
LONGEST_TEXT = 3000  # characters of a prompt or a completion; the rest is in rollouts/

WIDTH, HEIGHT = 420, 240  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 408, 12, 206  # the sides of its axes


@dataclass(frozen=True)
class Dot:
    """A number of the record, and its place in a chart."""

    step: int
    value: float
    x: float
    y: float


@dataclass(frozen=True)
class Line:
    number: int  # of its colour
    legend: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    x_ticks: list[tuple[float, str]]  # place and number
    y_ticks: list[tuple[float, str]]
    lines: list[Line]


def write_report(run: Path, output: Path | None = None) -> Path:
    """Writes the page for the run in a folder; `output` (None: run/report.html) is replaced."""
    path = output or RunFolder(run).page
    path.parent.mkdir(parents=True, exist_ok=True)
    # A byte-level tokenizer can leave half of a character pair, which is not valid in a page.
    with durable.writing(path, errors="replace") as file:
        file.write(page(run))
    return path


def page(run: Path) -> str:
    """The whole document, from metrics.jsonl and whatever else is in the folder."""
    folder = RunFolder(run)
    rows = read_jsonl(folder.metrics)
    settings = read_yaml(run)
    starts = read_starts(run)
    changed, at_default = configuration(settings)
    charts = [chart(panel, rows) for panel in (*PANELS, *ALSO_ON_THE_PAGE, *waiting(rows))]
    template = _templates().get_template("report.html.j2")
    return template.render(
        title=run.resolve().name,
        subtitle=subtitle(starts, settings),
        tiles=tiles(rows, settings),
        charts=[drawn for drawn in charts if drawn is not None],
        completions=completions(folder),
        held_out=held_out(folder),
        changed=changed,
        at_default=at_default,
        starts=environment(starts),
    )


def _templates() -> Environment:
    """Everything that a template prints is escaped, and a name that it lacks is an error."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"setting": _setting, "question": _question, "reward": reward_text}
    templates.globals |= {
        "longest_text": LONGEST_TEXT,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "bottom": BOTTOM,
        "colours": style.COLOURS[: len(style.ON_DARK)],
        "colours_on_dark": style.ON_DARK,
    }
    return templates


def subtitle(starts: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    """When the run began, and of what it is."""
    begun = [str(start["started"]) for start in starts[:1]]
    named = [f"{key}={settings[key]}" for key in ("model", "data", "algorithm") if key in settings]
    return begun + named


def tiles(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, str]:
    """The numbers people ask for first, by name."""
    steps = points(rows, "time_s")
    done = steps[-1][0] if steps else 0
    # Rows of an earlier version may have no time.
    seconds = sum(t for name in ("time_s", "eval_time_s") for _, t in points(rows, name))
    speeds = [speed for _, speed in points(rows, "tokens_per_s")]
    memory = [peak for _, peak in points(rows, "memory_gb")]
    kl = points(rows, "kl")
    facts = {
        "steps": f"{done} of {settings['steps']}" if "steps" in settings else str(done),
        "reward, first and last step": _first_and_last(points(rows, "reward")),
        "held-out accuracy, before and after": _first_and_last(points(rows, "eval_accuracy")),
        "KL to the reference, nats": f"{kl[-1][1]:.3g}" if kl else "-",
        "tokens a second, median step": f"{median(speeds):.0f}" if speeds else "-",
        "time in steps and evaluations": _duration(seconds),
    }
    if memory:
        facts["peak memory"] = f"{max(memory):.2f} GB"
    return facts


def chart(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """A panel's curves and axes; None where the record has none of its columns."""
    curves = [
        (number, legend, found)
        for number, column, legend in numbered(panel)
        if (found := points(rows, column))
    ]
    if not curves:
        return None
    values = [value for _, _, found in curves for _, value in found]
    last = max(step for _, _, found in curves for step, _ in found)
    steps = _ticks(0, max(last, 1), whole=True)
    heights = _ticks(min(0.0, *values), max(values) if max(values) > min(0.0, *values) else 1.0)

    def across(step: float) -> float:
        return round(LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (RIGHT - LEFT), 1)

    def up(value: float) -> float:
        share = (value - heights[0]) / (heights[-1] - heights[0])
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    lines = []
    for number, legend, found in curves:
        dots = [Dot(step, value, across(step), up(value)) for step, value in found]
        lines.append(Line(number, legend, dots))
    return Chart(
        title=panel.title[0].upper() + panel.title[1:],
        unit=panel.unit,
        x_ticks=[(across(tick), f"{tick:g}") for tick in steps],
        y_ticks=[(up(tick), f"{tick:g}") for tick in heights],
        lines=lines,
    )


def completions(folder: RunFolder) -> dict[int, list[tuple[str, Rollout]]]:
    """By step, for steps spread over the run: best, worst and random completions, each with that
    word.
    """
    logs = folder.all_rollouts()
    shown = {}
    for step in evenly_spaced(list(logs), STEPS_SHOWN):
        rollouts = [rollout for rollout in read_rollouts(logs[step]) if not rollout.demonstrated]
        best, worst = best_and_worst(rollouts, COMPLETIONS_SHOWN)
        groups = {"best": best, "worst": worst, "random": some(rollouts, COMPLETIONS_SHOWN)}
        shown[step] = [(word, rollout) for word, chosen in groups.items() for rollout in chosen]
    return shown


def held_out(folder: RunFolder) -> list[tuple[Rollout, Rollout]] | None:
    """Greedy completions of the same held-out prompts in the first and in the last evaluation;
    None where there are no two evaluations.
    """
    logs = list(folder.all_samples().values())
    if len(logs) < 2:
        return None
    before, after = (
        {r.group: r for r in read_rollouts(log) if r.temperature == 0.0}
        for log in (logs[0], logs[-1])
    )
    return [
        (before[group], now)
        for group, now in list(after.items())[:HELD_OUT_SHOWN]
        if group in before
    ]


def configuration(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that differ from the defaults, and the rest."""
    defaults = asdict(TrainConfig())
    changed = {k: v for k, v in settings.items() if k not in defaults or defaults[k] != v}
    return changed, {k: v for k, v in settings.items() if k not in changed}


def environment(starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """For the run's first start, and each time it was resumed: a caption ("" for the first) and
    what is known.
    """
    shown = []
    for number, start in enumerate(starts):
        # Earlier versions recorded no start: the first one that is known may be a resumption.
        resumed = number > 0 or start["step"] > 0
        caption = f"Resumed after {start['step']} steps" if resumed else ""
        known = {k: v for k, v in start.items() if k not in ("step", "run_id") and v is not None}
        if "changed" in known:
            known["changed"] = ", ".join(
                f"{name} from {values['was']} to {values['now']}"
                for name, values in known["changed"].items()
            )
        shown.append((caption, known))
    return shown


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """Up to `count` items, evenly over all of them, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def some(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """As good as random, and the same each time the page is written."""

    def draw(numbered: tuple[int, Rollout]) -> str:
        number, rollout = numbered
        text = f"{number} {rollout.completion_ids}"
        return hashlib.sha256(text.encode()).hexdigest()

    return [rollout for _, rollout in sorted(enumerate(rollouts), key=draw)[:count]]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    ticks = [float(tick) for tick in MaxNLocator(5, integer=whole).tick_values(low, high)]
    inner = [tick for tick in ticks if low < tick < high]
    below = [tick for tick in ticks if tick <= low]
    above = [tick for tick in ticks if tick >= high]
    # The locator counts in steps of a float: 0.30000000000000004 is 0.3.
    return [round(tick, 12) for tick in [*below[-1:], *inner, *above[:1]]]


def _first_and_last(values: Sequence[tuple[int, float]]) -> str:
    return f"{values[0][1]:.3f} \N{RIGHTWARDS ARROW} {values[-1][1]:.3f}" if values else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _question(rollout: Rollout) -> str:
    return str(rollout.columns.get("prompt", rollout.prompt))


def _setting(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return '""' if value == "" else str(value)
