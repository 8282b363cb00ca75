"""The page about a run: it stands alone, says what the record says, and runs no model's text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data.rollout_log import write_rollouts
from agro_train.run_folder import RunFolder
from agro_train.watch.environment import read_starts, record_start
from agro_train.watch.panels import PANELS
from agro_train.watch.report import (
    LONGEST_TEXT,
    STEPS_SHOWN,
    chart,
    configuration,
    environment,
    evenly_spaced,
    page,
    some,
    tiles,
)
from tests.train.models import rollout

NASTY = '<script>alert(1)</script> & "quotes" </div>\x00\ud800'
VOID = {"meta"}


class Page(HTMLParser):
    """What is on a page: balanced elements, texts by their innermost element, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def words(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))


class NoDevice:
    type = "cpu"


class OneProcess:
    """What `record_start` asks an accelerator."""

    device = NoDevice()
    num_processes = 1


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps of two groups, evaluated before and after, started twice."""
    folder = RunFolder(tmp_path / "<run>")
    config = TrainConfig(steps=3, beta=0.125, output_dir=str(folder.path))
    folder.create(config.to_yaml())
    folder.log(0, {"eval_accuracy": 0.25, "eval_time_s": 1.0})
    for step in (1, 2, 3):
        folder.log(
            step,
            {"reward": step / 4, "kl": 0.5 * step, "time_s": 2.0, "tokens_per_s": 10.0 * step}
            | {"memory_gb": 1.0 + step / 8, "entropy": float("nan")},
        )
        rollouts = [
            replace(rollout(group, [1], [2], reward), completion=f"{group} {reward} {NASTY}")
            for group in ("g", "h")
            for reward in (0.0, step / 2, None, 1.0 + step)
        ]
        write_rollouts(folder.rollouts(step), rollouts)
    folder.log(3, {"eval_accuracy": 0.75, "eval_time_s": 1.0})
    for step, answer in ((0, "wrong"), (3, "right")):
        greedy = replace(rollout("q", [1], [2], step / 3), completion=answer, temperature=0.0)
        write_rollouts(folder.samples(step), [greedy])
    for step, resumed in ((0, False), (2, True)):
        record_start(folder.path, step, OneProcess(), resumed=resumed)  # type: ignore[arg-type]
    return folder.path


def test_page_is_well_formed_and_needs_no_other_file(run: Path) -> None:
    parsed = Page(page(run))
    assert not {tag for tag, _ in parsed.tags} & {"link", "img", "iframe", "object", "base"}
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "data", "onclick"} & attributes.keys(), tag
    code = [text for tag, text in parsed.texts if tag in ("script", "style")]
    values = [str(value) for _, attributes in parsed.tags for value in attributes.values()]
    for part in (*code, *values):
        assert not re.search(r"//|url\(|@import|fetch|XMLHttpRequest", part)
    assert [tag for tag, _ in parsed.tags].count("script") == 1


def test_page_escapes_what_the_model_wrote(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text(encoding="utf-8")  # half a character pair is not in it
    assert "alert(1)&lt;/script&gt;" in text and "<script>alert" not in text
    assert "&lt;run&gt;" in text and "<run>" not in text


def test_tiles_say_what_the_record_says(run: Path) -> None:
    words = Page(page(run)).words()
    for fact in ("3 of 3 steps", "0.250 \N{RIGHTWARDS ARROW} 0.750 reward, first and last"):
        assert fact in words
    assert "0.250 \N{RIGHTWARDS ARROW} 0.750 held-out accuracy" in words
    assert "1.5 KL to the reference" in words and "20 tokens a second" in words
    assert "8.0 s time in steps" in words and "1.38 GB peak memory" in words


def test_charts_hold_every_number(run: Path) -> None:
    """The dots' titles carry the numbers, and their places are in the order of the values."""
    parsed = Page(page(run))
    titles = [text for tag, text in parsed.texts if tag == "title"]
    assert [t for t in titles if t.startswith("training samples, step 2:")] == [
        "training samples, step 2: 0.5",
        "training samples, step 2: 1",
    ]
    lines = [a for tag, a in parsed.tags if tag == "polyline"]
    assert len(lines) == 3  # reward, held-out accuracy, KL; of entropy there is no number
    for line in lines:
        places = [tuple(map(float, p.split(","))) for p in str(line["points"]).split()]
        assert places == sorted(places) and [y for _, y in places] == sorted(
            (y for _, y in places), reverse=True
        )
        assert all(0 <= x <= 420 and 0 <= y <= 240 for x, y in places)


def test_completions_are_shown_by_reward_for_each_step(run: Path) -> None:
    text = page(run)
    parsed = Page(text)
    options = [a["value"] for tag, a in parsed.tags if tag == "option"]
    tables = [a["data-step"] for tag, a in parsed.tags if a.get("class") == "table step"]
    assert options == tables == ["1", "2", "3"]
    last = text[text.index('data-step="3"') : text.index("Held-out prompts")]
    found = re.findall(r'"narrow">(\w+)</td>.*?"narrow">(.*?)</td>', last)
    assert [reward for word, reward in found if word == "best"] == ["4", "4", "1.5"]
    assert [reward for word, reward in found if word == "worst"] == ["0", "0", "1.5"]
    assert sum(word == "random" for word, _ in found) == 3
    assert "wrong" in parsed.words() and "right" in parsed.words()


def test_configuration_begins_with_what_was_changed(run: Path) -> None:
    text = page(run)
    changed = text[text.index("<h2>Configuration") : text.index("<details>")]
    assert "beta</th><td>0.125" in changed and "learning_rate" not in changed
    rest = text[text.index("<details>") : text.index("<h2>Environment")]
    assert "learning_rate</th><td>1e-05" in rest


def test_environment_is_recorded_at_every_start(run: Path) -> None:
    first, second = read_starts(run)
    assert first["run_id"] == second["run_id"] and [first["step"], second["step"]] == [0, 2]
    words = Page(page(run)).words()
    assert first["torch"] in words and first["cpu"] in words
    assert "Resumed after 2 steps" in words


def test_page_of_a_bare_record(tmp_path: Path) -> None:
    """Before the first step, and of a folder that has nothing else."""
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no config.yaml" in Page(page(tmp_path)).words()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.0}) + "\n")
    assert [tag for tag, _ in Page(page(tmp_path)).tags].count("svg") == 1


def test_steps_shown_are_spread_over_the_run() -> None:
    items = list(range(100))
    shown = evenly_spaced(items, STEPS_SHOWN)
    assert len(set(shown)) == STEPS_SHOWN and shown[0] == items[0] and shown[-1] == items[-1]
    assert evenly_spaced(items[:3], STEPS_SHOWN) == items[:3]


def test_random_completions_stay_the_same() -> None:
    rollouts = [rollout("g", [1], [number], 0.0) for number in range(20)]
    assert some(rollouts, 3) == some(rollouts, 3) != rollouts[:3]


def test_long_texts_are_cut_and_text_keeps_its_lines(run: Path) -> None:
    """A text's own line breaks are shown, so the page has none beside it."""
    long = replace(rollout("g", [1], [2], 1.0), completion="  two\nlines" + "x" * LONGEST_TEXT)
    cut_off = replace(long, completion="short", finish="length")
    write_rollouts(RunFolder(run).rollouts(3), [long, cut_off])
    text = page(run)
    assert '<div class="text">  two\nlinesxx' in text
    assert 'xx<i class="quiet"> ... 11 more characters</i></div>' in text
    assert '<div class="text">short</div> <i class="quiet">(cut off)</i></td>' in text


def test_chart_places_numbers_on_its_axes() -> None:
    rows = [{"step": 0, "eval_reward": 0.8}, {"step": 4, "eval_reward": -0.8, "reward": None}]
    drawn = chart(PANELS[0], rows)
    assert drawn is not None and drawn.title == "Mean reward"
    (line,) = drawn.lines
    assert (line.number, line.legend) == (1, "held-out, sampled")
    x_at = {text: at for at, text in drawn.x_ticks}
    y_at = {text: at for at, text in drawn.y_ticks}
    places = [(x_at["0"], y_at["0.8"]), (x_at["4"], y_at["-0.8"])]
    assert [(dot.x, dot.y) for dot in line.dots] == places
    assert [(dot.step, dot.value) for dot in line.dots] == [(0, 0.8), (4, -0.8)]
    assert chart(PANELS[1], rows) is None


def test_what_is_not_known_is_no_number() -> None:
    assert tiles([], {}) == {
        "steps": "0",
        "reward, first and last step": "-",
        "held-out accuracy, before and after": "-",
        "KL to the reference, nats": "-",
        "tokens a second, median step": "-",
        "time in steps and evaluations": "0.0 s",
    }
    assert configuration({"beta": 0.5, "seed": 0, "unknown": 1})[0] == {"beta": 0.5, "unknown": 1}
    assert environment([{"step": 2, "run_id": "a", "gpu": None, "torch": "2"}]) == [
        ("Resumed after 2 steps", {"torch": "2"})
    ]


def test_what_an_environment_said_is_shown_apart(run: Path) -> None:
    turns = [("model", "one+two="), ("environment", "<three>"), ("model", "four")]
    several = replace(
        rollout("g", [1], [2, 3, 4], 1.0),
        completion="four",
        turns=tuple({"by": by, "tokens": 1, "text": text} for by, text in turns),
    )
    write_rollouts(RunFolder(run).rollouts(3), [several, several])
    text = page(run)
    assert (
        '<div class="text">one+two=</div>'
        '<div class="environment"><i class="quiet">environment</i>'
        '<div class="text">&lt;three&gt;</div></div><div class="text">four</div></td>'
    ) in text
