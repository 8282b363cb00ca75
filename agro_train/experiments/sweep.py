"""Many runs, two at a time, whose curves go into one CSV file as each of them ends.

A reproduction that was killed goes on with the runs that the file lacks, and figures that share
runs share them there. A run is known by the settings that it names; what the others were is in
language_defaults.json, so that a changed default does not change what a name means.
"""

import csv
import fcntl
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from agro_train import durable
from agro_train.experiments import language
from agro_train.experiments.language import (
    QUICK_PROMPTS,
    Curve,
    Point,
    Start,
    defaults,
    point,
    start_name,
    version,
)
from agro_train.refusal import Refusal
from agro_train.settings import KEYS
from agro_train.watch.environment import git_commit

T = TypeVar("T")

WORKERS = 2  # processes of one thread each
ABOUT = ("settings", "seed", "base", "commit", "time_s")  # columns of a run, the same in its rows

Work = Callable[[Point, Path, int | None], T]


class Sweep:
    """The runs in output_dir: language_curves.csv, one row a mark of each, the starts' pass rates,
    language_starts.csv, and the defaults of the settings that runs do not name.

    Args:
        quick: in this process, and from recordings of a few prompts.
        measure, make_start: what makes a run's curve, and what runs start from.
    """

    def __init__(
        self,
        output_dir: Path,
        quick: bool,
        measure: Work[Curve] = language.measure,
        make_start: Work[Start] = language.make_start,
    ) -> None:
        self.output_dir = output_dir
        self.measure, self.make_start = measure, make_start
        self.workers = 1 if quick else WORKERS
        self.recorded_prompts = QUICK_PROMPTS if quick else None
        self.work = output_dir / "work"  # models and recordings; they can be made again
        self._read_files()

    @property
    def curves_path(self) -> Path:
        return self.output_dir / "language_curves.csv"

    @property
    def defaults_path(self) -> Path:
        return self.output_dir / "language_defaults.json"

    @property
    def starts_path(self) -> Path:
        return self.output_dir / "language_starts.csv"

    def curves(self, points: Iterable[Point]) -> dict[Point, Curve]:
        """Of the points: what is missing is run first. Raises Refusal where another
        process is at it in the same folder."""
        wanted = list(dict.fromkeys(points))
        known = self._known()
        if any(one not in known for one in wanted):
            with self._alone():
                self._read_files()  # another process may have gone on with them since
                known = self._known()
                self._run([one for one in wanted if one not in known])
            known = self._known()
        return {one: known[one] for one in wanted}

    def _read_files(self) -> None:
        # The defaults first: rows that already name what has changed since are left as they are.
        path = self.defaults_path
        then = json.loads(path.read_text()) if path.is_file() else None
        self.rows, self.start_rows = _read(self.curves_path), _read(self.starts_path)
        if self.rows:
            self._name_changed_defaults(then)

    def _name_changed_defaults(self, then: Mapping[str, object] | None) -> None:
        """A run keeps its name's meaning: where a default has changed since it was made, its
        settings name the one that it had, and a run with today's is another run."""
        path = self.defaults_path
        if then is None:
            raise Refusal(
                f"output_dir: expected {path}, which says what the runs beside it had for the "
                "settings that they do not name, got no such file; bring it, or give another folder"
            )
        now = json.loads(json.dumps(defaults()))
        # A setting that came later: what a run did before there was it.
        older = {key: now[key] if KEYS[key].older is None else KEYS[key].older for key in now}
        then = older | dict(then)
        changed = {key: then[key] for key in now if now[key] != then[key]}
        for row in self.rows if changed else ():
            one = _point_of(row)
            settings = dict(each.split("=", 1) for each in one.settings.split())
            had = {key: value for key, value in changed.items() if key not in one.named}
            row["settings"] = point(one.seed, had | settings, one.base).settings

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two would make the same runs, and each write its file without the other's."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refusal(
                    f"output_dir: expected one reproduction at a time, got {self.output_dir}, in "
                    "which another is running; wait for it, or give another folder"
                ) from None
            yield

    def pass_rates(self, one: Point) -> dict[str, float]:
        """The reference's on the held-out prompts, where the run has started."""
        name = start_name(one)
        return {
            row["prompt"]: float(row["pass_rate"])
            for row in self.start_rows
            if row["start"] == name
        }

    def _known(self) -> dict[Point, Curve]:
        """Runs of another version of their base configuration do not count."""
        found: dict[Point, Curve] = {}
        for row in self.rows:
            one = _point_of(row)
            if row["base"] == version(one.base):
                numbers = {k: float(v) for k, v in row.items() if k not in ABOUT}
                found.setdefault(one, []).append(numbers)
        return found

    def _run(self, missing: Sequence[Point]) -> None:
        if not missing:
            return
        # Before the first new run: killed in between, the old ones alone get their names once more.
        if self.rows:
            _write(self.curves_path, self.rows)
        durable.replace(self.defaults_path, json.dumps(defaults(), indent=2) + "\n")
        commit = git_commit(Path(__file__))
        began = time.perf_counter()
        # The starts first, or two processes would make the same one at once.
        starts: dict[str, Point] = {}
        for one in missing:
            if one.config().recorded or start_name(one) not in starts:
                starts[start_name(one)] = one
        for one, start in self._each(self.make_start, list(starts.values())):
            self._note_start(one, start)
        for done, (one, (curve, seconds)) in enumerate(
            self._each(partial(_timed, self.measure), missing), start=1
        ):
            about = (one.settings, str(one.seed), version(one.base), str(commit), f"{seconds:.0f}")
            for mark in curve:
                numbers = {name: f"{value:.6g}" for name, value in mark.items()}
                self.rows.append(dict(zip(ABOUT, about, strict=True)) | numbers)
            _write(self.curves_path, self.rows)
            elapsed = time.perf_counter() - began
            print(f"{done} of {len(missing)} in {elapsed:.0f} s: {one.command}", flush=True)

    def _note_start(self, one: Point, start: Start) -> None:
        if self.pass_rates(one):
            return
        self.start_rows += [
            {"start": start_name(one), "prompt": p, "pass_rate": f"{rate:.6g}"}
            for p, rate in start.pass_rates.items()
        ]
        _write(self.starts_path, self.start_rows)

    def _each(self, work: Work[T], points: Sequence[Point]) -> Iterator[tuple[Point, T]]:
        """The work's result for each point, as they come."""
        if self.workers == 1:
            for one in points:
                yield one, work(one, self.work, self.recorded_prompts)
            return
        with ProcessPoolExecutor(
            self.workers,
            mp_context=get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(1,),
        ) as pool:
            futures: dict[Future[T], Point] = {
                pool.submit(work, one, self.work, self.recorded_prompts): one for one in points
            }
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _point_of(row: Mapping[str, str]) -> Point:
    return Point(row["settings"], int(row["seed"]), row["base"].partition("@")[0])


def _timed(
    measure: Work[Curve], one: Point, work: Path, recorded_prompts: int | None
) -> tuple[Curve, float]:
    began = time.perf_counter()
    return measure(one, work, recorded_prompts), time.perf_counter() - began


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    durable.replace(path, text.getvalue())
