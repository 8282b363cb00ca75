"""RUN/report.html: curves, configuration, environment and completions of a run, on one page.

The page stands alone: no file or address outside it is read, so that it can be mailed or attached.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.ticker import MaxNLocator

from agro_train import durable
from agro_train.config import TrainConfig
from agro_train.data.recorded import read_rollouts
from agro_train.data.rows import read_jsonl
from agro_train.run_folder import RunFolder
from agro_train.types import Rollout
from agro_train.watch.display import best_and_worst, reward_text
from agro_train.watch.environment import read_starts
from agro_train.watch.plots import points, read_yaml

STEPS_SHOWN = 12  # steps whose completions are on the page, spread evenly over the run
COMPLETIONS_SHOWN = 3  # best, worst and random ones of each of them
LONGEST_TEXT = 3000  # characters of a prompt or a completion; the rest is in rollouts/

# title, unit, [(column, legend)]
CHARTS = [
    (
        "Reward",
        "mean",
        [
            ("reward", "training samples"),
            ("eval_reward", "held-out, sampled"),
            ("eval_accuracy", "held-out, greedy"),
        ],
    ),
    ("KL to the reference", "nats a completion", [("kl", "training samples")]),
    ("Entropy", "nats a token", [("entropy", "training samples")]),
    (
        "Completion length",
        "tokens",
        [("completions/mean_length", "training samples"), ("eval_length", "held-out, greedy")],
    ),
    (
        "Cut off at max_completion_length",
        "share",
        [
            ("completions/clipped_ratio", "training samples"),
            ("eval_truncated_rate", "held-out, greedy"),
        ],
    ),
    ("Gradient norm before clipping", "", [("grad_norm", "training samples")]),
]
WIDTH, HEIGHT = 420, 240  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34  # its margins, where the axes' numbers are


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
    rows = read_jsonl(RunFolder(run).metrics)
    settings = read_yaml(run)
    starts = read_starts(run)
    title = escape(run.resolve().name)
    begun = starts[0]["started"] if starts else ""
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">{escape(begun)} {_model_line(settings)}</p>',
        tiles(rows, settings),
        "<h2>Curves</h2>",
        '<div class="charts">',
        *(chart(name, unit, curves, rows) for name, unit, curves in CHARTS),
        "</div>",
        "<h2>Completions</h2>",
        completions(run),
        held_out(run),
        "<h2>Configuration</h2>",
        configuration(settings),
        "<h2>Environment</h2>",
        environment(starts),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def tiles(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The numbers people ask for first."""
    steps = points(rows, "time_s")
    done = steps[-1][0] if steps else 0
    # Steps that were not measured by this record (of another version) have no time.
    seconds = sum(t for name in ("time_s", "eval_time_s") for _, t in points(rows, name))
    speeds = [speed for _, speed in points(rows, "tokens_per_s")]
    memory = [peak for _, peak in points(rows, "memory_gb")]
    kl = points(rows, "kl")
    facts = [
        ("steps", f"{done} of {settings['steps']}" if "steps" in settings else str(done)),
        ("reward, first and last step", _first_and_last(points(rows, "reward"))),
        ("held-out accuracy, before and after", _first_and_last(points(rows, "eval_accuracy"))),
        ("KL to the reference, nats", f"{kl[-1][1]:.3g}" if kl else "-"),
        ("tokens a second, median step", f"{median(speeds):.0f}" if speeds else "-"),
        ("time in steps and evaluations", _duration(seconds)),
    ]
    if memory:
        facts.append(("peak memory", f"{max(memory):.2f} GB"))
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in facts
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def chart(
    title: str,
    unit: str,
    curves: Sequence[tuple[str, str]],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """One panel of curves as inline SVG; nothing where the record has no such column."""
    found = [
        (number, legend, points(rows, column))
        for number, (column, legend) in enumerate(curves)
        if points(rows, column)
    ]
    if not found:
        return ""
    values = [value for _, _, each in found for _, value in each]
    last = max(step for _, _, each in found for step, _ in each)
    x_ticks = _ticks(0, max(last, 1), whole=True)
    y_ticks = _ticks(min(0.0, *values), max(values) if max(values) > min(0.0, *values) else 1.0)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    shapes = []
    for tick in y_ticks:
        y = place(0, tick)[1]
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        y = HEIGHT - BOTTOM
        shapes.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{y}" y2="{y + 4}"/>')
        shapes.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    for number, legend, each in found:
        places = [place(step, value) for step, value in each]
        path = " ".join(f"{x},{y}" for x, y in places)
        shapes.append(f'<polyline class="c{number}" points="{path}"/>')
        # Dots carry the numbers, to be seen when pointed at; small ones where a line has many.
        radius = 3 if len(each) <= 40 else 1.5
        shapes += [
            f'<circle class="c{number}" cx="{x}" cy="{y}" r="{radius}">'
            f"<title>{escape(legend)}, step {step}: {value:.4g}</title></circle>"
            for (x, y), (step, value) in zip(places, each, strict=True)
        ]
    legends = "".join(
        f'<span class="c{number}">{escape(legend)}</span>' for number, legend, _ in found
    )
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="quiet">{escape(unit)}</span>'
        f'<div class="legend">{legends}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(shapes)}</svg></figure>"
    )


def completions(run: Path) -> str:
    """Best, worst and random completions of steps spread over the run, one step shown at a time."""
    logs = RunFolder(run).all_rollouts()
    if not logs:
        return '<p class="quiet">The folder has no log of rollouts.</p>'
    steps = evenly_spaced(list(logs), STEPS_SHOWN)
    choices = "".join(
        f'<option value="{step}"{" selected" if step == steps[-1] else ""}>{step}</option>'
        for step in steps
    )
    sections = [f'<p><label>Step <select id="step">{choices}</select></label></p>']
    for step in steps:
        rollouts = read_rollouts(logs[step])
        best, worst = best_and_worst(rollouts, COMPLETIONS_SHOWN)
        groups = {"best": best, "worst": worst, "random": some(rollouts, COMPLETIONS_SHOWN)}
        lines = [
            f'<tr><td class="narrow">{word}</td><td>{_text(_question(r))}</td>{_scored(r)}</tr>'
            for word, chosen in groups.items()
            for r in chosen
        ]
        sections.append(
            f'<div class="table step" data-step="{step}"><table><thead><tr><th></th><th>prompt</th>'
            f"<th>reward</th><th>completion</th></tr></thead><tbody>{''.join(lines)}</tbody>"
            "</table></div>"
        )
    return "\n".join(sections)


def held_out(run: Path, count: int = 6) -> str:
    """Greedy completions of held-out prompts at the start and at the last evaluation."""
    logs = list(RunFolder(run).all_samples().values())
    if len(logs) < 2:
        return ""
    first, last = (
        {r.group: r for r in read_rollouts(log) if r.temperature == 0.0}
        for log in (logs[0], logs[-1])
    )
    lines = [
        f"<tr><td>{_text(_question(now))}</td>{_scored(first[group])}{_scored(now)}</tr>"
        for group, now in list(last.items())[:count]
        if group in first
    ]
    return (
        '<h2>Held-out prompts, greedy</h2><div class="table"><table><thead><tr><th>prompt</th>'
        "<th>reward</th><th>before</th><th>reward</th><th>after</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def configuration(settings: Mapping[str, Any]) -> str:
    """What differs from the defaults, and behind a click the rest."""
    defaults = asdict(TrainConfig())
    changed = {k: v for k, v in settings.items() if k not in defaults or defaults[k] != v}
    rest = {k: v for k, v in settings.items() if k not in changed}
    if not settings:
        return '<p class="quiet">The folder has no config.yaml.</p>'
    same = f"<details><summary>{len(rest)} settings at their defaults</summary>{_table(rest)}"
    return f"{_table(changed)}{same}</details>"


def environment(starts: Sequence[Mapping[str, Any]]) -> str:
    """A table for the run's first start and one for every time it was resumed."""
    if not starts:
        return '<p class="quiet">The folder has no environment.json.</p>'
    tables = []
    for number, start in enumerate(starts):
        resumed = number > 0 or start["step"] > 0  # a run of an older version recorded no start
        caption = f"Resumed after {start['step']} steps" if resumed else ""
        shown = {k: v for k, v in start.items() if k not in ("step", "run_id") and v is not None}
        tables.append((f"<h3>{caption}</h3>" if caption else "") + _table(shown))
    return "".join(tables)


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


def _model_line(settings: Mapping[str, Any]) -> str:
    named = [f"{key}={settings[key]}" for key in ("model", "data", "algorithm") if key in settings]
    return escape(" ".join(named))


def _question(rollout: Rollout) -> str:
    return str(rollout.columns.get("prompt", rollout.prompt))


def _scored(rollout: Rollout) -> str:
    """Two cells: the reward and the completion."""
    ending = ' <i class="quiet">(cut off)</i>' if rollout.finish == "length" else ""
    reward = f'<td class="narrow">{reward_text(rollout.reward)}</td>'
    return f"{reward}<td>{_text(rollout.completion)}{ending}</td>"


def _text(text: str) -> str:
    left = len(text) - LONGEST_TEXT
    tail = f'<i class="quiet"> ... {left} more characters</i>' if left > 0 else ""
    return f'<div class="text">{escape(text[:LONGEST_TEXT])}{tail}</div>'


def _table(values: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(_value(value))}</td></tr>"
        for key, value in values.items()
    )
    return f'<div class="table"><table class="facts"><tbody>{lines}</tbody></table></div>'


def _value(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return '""' if value == "" else str(value)


# Okabe and Ito's colours, which colour-blind readers tell apart; lighter ones on a dark page.
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #5f6670; --page: #ffffff;
  --tile: #f3f4f6; --rule: #d9dce1; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --quiet: #9aa1ab; --page: #16181c;
  --tile: #22252b; --rule: #3a3f47; --c0: #56b4e9; --c1: #f0924c; --c2: #2fc79b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1260px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { margin: 0; font-size: 26px; } h2 { margin: 36px 0 12px; font-size: 19px; }
h3 { margin: 20px 0 8px; font-size: 15px; }
.quiet { color: var(--quiet); font-weight: normal; } p { margin: 4px 0 12px; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); }
.tile { background: var(--tile); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 17px; white-space: nowrap; }
.tile span { color: var(--quiet); font-size: 13px; }
.charts { display: grid; gap: 22px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
figure { margin: 0; display: flex; flex-direction: column; justify-content: space-between; }
svg { width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 11px; } .grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); }
polyline.c2 { stroke: var(--c2); } circle.c0 { fill: var(--c0); }
circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
.legend span { font-size: 13px; margin-right: 14px; white-space: nowrap; }
.legend span::before { content: ""; display: inline-block; width: 14px; height: 3px;
  margin-right: 5px; vertical-align: middle; background: currentColor; }
.legend .c0 { color: var(--c0); } .legend .c1 { color: var(--c1); }
.legend .c2 { color: var(--c2); }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--quiet); font-weight: normal; }
.facts { width: auto; } .facts th { font-weight: normal; color: var(--quiet); }
.narrow { width: 1%; white-space: nowrap; }
.text { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 16em; overflow-y: auto; min-width: 9em; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--quiet); }
select { font: inherit; }
"""
# Without scripts all steps are shown, one below the other.
SCRIPT = """
const chosen = document.getElementById("step");
function show() {
  for (const part of document.querySelectorAll(".step")) {
    part.hidden = part.dataset.step !== chosen.value;
  }
}
if (chosen) { chosen.addEventListener("change", show); show(); }
"""
