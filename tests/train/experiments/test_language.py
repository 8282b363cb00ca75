"""The experiments with a language model: what is compared is a comparison, and it all runs."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from agro_train import experiments
from agro_train.cli import main
from agro_train.data.mix import in_recorded_order, plan
from agro_train.data.rows import read_jsonl
from agro_train.experiments import (
    ahead,
    beyond,
    compare,
    fig2,
    fig4,
    fig5,
    language,
    offline,
    smollm2,
    sweep,
)
from agro_train.experiments.compare import ALGORITHMS
from agro_train.experiments.language import QUICK, Curve, Point, Start, measure, point
from agro_train.experiments.sweep import Sweep
from agro_train.refusal import Refusal
from agro_train.seeds import shuffled
from agro_train.watch import style

HOME = Path(__file__).parents[3] / "docs" / "experiments"
FIGURES = ("fig2", "fig5", "fig4", "beyond")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with experiments.one_thread():
        yield


def curve(**last: float) -> Curve:
    """Two marks that differ where `last` says."""
    first = dict.fromkeys([*compare.MEASURES, "learned", "sampled"], 0.5)
    return [{"step": 0.0, **first, "eval_kl": 0.0}, {"step": 2.0, **first, **last}]


# --- Numbers --------------------------------------------------------------------------------------


def test_students_t_leaves_five_percent() -> None:
    for freedom, t in enumerate(compare.T_95, start=1):
        x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
        log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = math.exp(log_scale) / math.sqrt(freedom * math.pi)
        inside = torch.trapezoid(density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
        assert float(inside) == pytest.approx(0.95, abs=5e-5)


def test_an_interval_is_the_means() -> None:
    found = compare.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.half) == pytest.approx((3.0, 2.776 * math.sqrt(2.5 / 5)))
    assert found.beyond_noise
    assert not compare.interval([-1.0, 1.0, 0.5]).beyond_noise
    assert compare.interval([0.1, 0.1]).beyond_noise
    assert not compare.interval([0.0, 0.0]).beyond_noise
    assert not compare.interval([math.nan, 1.0]).beyond_noise


def test_differences_are_taken_within_a_seed() -> None:
    """Seeds far apart, the algorithms 0.1 apart in each: larger than the noise all the same."""
    ours = [point(seed, {"beta": 0.1}) for seed in range(3)]
    theirs = [point(seed, {"beta": 0.2}) for seed in range(3)]
    curves = {one: curve(eval_reward=0.3 * one.seed + 0.1) for one in ours}
    curves |= {one: curve(eval_reward=0.3 * one.seed) for one in theirs}
    found = compare.difference(curves, ours, theirs, "eval_reward")
    assert found.mean == pytest.approx(0.1) and found.half < 1e-9
    assert found.signed() == "**+0.100 ± 0.000**"
    with pytest.raises(AssertionError, match="one seed"):
        compare.difference(curves, ours, theirs[::-1], "eval_reward")
    (row,) = compare.statement_rows(
        curves, {"a": ours, "b": theirs}, "b", {"eval_reward": "sampled"}
    )
    assert (row["name"], row["larger_than_noise"], row["seeds"]) == ("a", "yes", 3)


def test_the_learning_rate_is_the_best_regularised_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Known(Sweep):
        def curves(self, points: Any) -> dict[Point, Curve]:
            # The larger rate earns more, at a KL that costs more than that.
            found = {one: one.config().learning_rate for one in points}
            return {
                one: curve(eval_reward=0.5 + 100 * rate, eval_kl=2000 * rate)
                for one, rate in found.items()
            }

    variants = {"free": {"beta": 0.001}, "dear": {"beta": 1.0}}
    tuned = compare.tune(Known(tmp_path, quick=True), variants, (1e-4, 1e-3), (7, 8), (1e-5, 1e-6))
    assert tuned.rates == {"free": 1e-3, "dear": 1e-6}
    tried = {name: sorted(found) for name, found in tuned.scores.items()}
    assert tried == {"free": [1e-4, 1e-3], "dear": [1e-6, 1e-5, 1e-4, 1e-3]}
    compare.report_tuning(tmp_path / "rates.csv", {"here": tuned})
    assert "| here | free |  |  | 0.510 | **0.598** |" in capsys.readouterr().out


def test_a_comparison_of_unequal_runs_is_called_unfair() -> None:
    ours, theirs = point(0, {}), point(0, {"beta": 0.5})
    assert all(c.holds for c in compare.fair({ours: curve(), theirs: curve()}, [ours, theirs]))
    more = {ours: curve(), theirs: curve(learned=99)}
    assert [c.holds for c in compare.fair(more, [ours, theirs])] == [False, True]
    other = curve()
    other[0]["eval_reward"] = 0.7
    moved = curve()
    moved[0]["eval_kl"] = 0.1
    for wrong in (other, moved):
        found = compare.fair({ours: curve(), theirs: wrong}, [ours, theirs])
        assert [c.holds for c in found] == [True, False]


@pytest.mark.parametrize("beta", [0.001, 0.3, 2.0])
def test_the_optimum_is_the_best_policy(beta: float) -> None:
    """One prompt of pass rate 1/4: against every pass rate on a grid."""
    count = 1_000_000  # the half completion does not show
    best = fig4.optimum(torch.tensor([0.25]), count, beta)
    p = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    kl = torch.xlogy(p, p / 0.25) + torch.xlogy(1 - p, (1 - p) / 0.75)
    value, at = (p - beta * kl).max(0)
    assert best.reward - beta * best.kl == pytest.approx(float(value), abs=1e-6)
    assert best.reward == pytest.approx(float(p[at]), abs=1e-4)


# --- Settings -------------------------------------------------------------------------------------


def test_points_are_equal_however_their_numbers_are_written() -> None:
    assert point(1, {"beta": 1e-1, "lr_cap": True}) == point(1, {"lr_cap": "true", "beta": "0.10"})
    assert point(1, {}) != point(2, {})
    one = point(3, {"learning_rate": 0.001, "beta": 0.1})
    assert one.command == "agro train graded-sums beta=0.1 learning_rate=0.001 seed=3"
    assert (one.config().beta, one.config().seed) == (0.1, 3)


def test_a_setting_that_the_base_has_anyway_changes_no_point() -> None:
    assert point(3, {"learning_rate": 0.0003, "beta": 0.001, "data": "graded-sums"}) == point(3, {})
    assert point(3, {}).command == "agro train graded-sums seed=3"
    assert point(3, {"learning_rate": 2e-5}, "smollm2-arithmetic").settings == ""


def test_figures_share_their_common_runs() -> None:
    rates = dict.fromkeys(ALGORITHMS, 1e-3)
    figure_2 = fig2.points(rates, quick=False)
    for name, value in (("staleness", "0"), ("group_size", "8")):
        question = beyond.QUESTIONS[name]
        named = beyond.points(question, dict.fromkeys(question.values, rates), quick=False)[value]
        assert {algorithm: figure_2[algorithm] for algorithm in named} == named
    assert fig4.points((fig4.OWN, 0.001), rates, quick=False) == figure_2
    offline = {name: rates[name] for name in fig4.OFF_POLICY}
    for setting in fig5.SETTINGS[:2]:
        assert fig5.points(setting, offline, False) == fig4.points(setting, offline, False)


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_of_every_figure_is_a_valid_configuration(quick: bool) -> None:
    rates = dict.fromkeys(ALGORITHMS, 3e-4)
    runs = [fig2.points(rates, quick)]
    of_others = {name: rates[name] for name in fig5.NAMES}
    runs += [fig5.points(setting, of_others, quick) for setting in fig5.SETTINGS]
    own = {name: rates[name] for name in fig4.ON_POLICY}
    others = {name: rates[name] for name in fig4.OFF_POLICY}
    for beta in fig4.BETAS:
        runs.append(fig4.points((fig4.OWN, beta), own, quick))
        runs.append(fig4.points((fig4.REFERENCES, beta), others, quick))
    for k in ahead.STALENESS:
        runs.append(fig2.points(dict.fromkeys(ahead.NAMES, 3e-4), quick, max_staleness=k))
    runs.append(smollm2.points(smollm2.NAMES, quick))
    runs.append(smollm2.points(offline.NAMES, quick, {"recorded": language.RECORDED}))
    for question in beyond.QUESTIONS.values():
        chosen = dict.fromkeys(question.values, rates)
        runs += beyond.points(question, chosen, quick).values()
    for named in runs:
        for points in named.values():
            for one in points:
                one.config()
    if not quick:
        assert len(fig2.SEEDS) >= 5
    assert not set(fig2.SEEDS) & set(fig2.TUNING_SEEDS)


def test_samples_ahead_of_the_updates_are_tapered_and_those_in_step_are_not() -> None:
    """Without staleness the taper acts on nothing, and its runs are AGRO's own."""
    agro, tapered = (ALGORITHMS[name].settings for name in ("agro", "agro_tapered"))
    assert point(0, agro) == point(0, {**tapered, "max_staleness": 0})
    ahead_of = [point(0, {**settings, "max_staleness": 4}) for settings in (agro, tapered)]
    assert [one.settings for one in ahead_of] == [
        "max_staleness=4 off_policy_taper=0",
        "max_staleness=4",
    ]


def test_half_the_updates_fit_into_the_time_of_generation_and_update_in_turn() -> None:
    def runs(rise: float) -> list[Point]:
        return [point(seed, {"beta": rise}) for seed in range(2)]

    later = {"agro": {"0": runs(0.1), "1": runs(0.2)}}
    curves = {
        one: [{"step": step, "eval_reward": rise * step} for step in (0, 15, 30, 45, 60)]
        for rise, named in ((0.01, "0"), (0.005, "1"))
        for one in later["agro"][named]
    }
    (row,) = ahead.equal_time(curves, later)
    assert row == {
        "algorithm": "agro",
        "k = 0": str(compare.interval([0.3, 0.3])),
        "k = 1": str(compare.interval([0.3, 0.3])),
    }


def test_mixed_steps_have_the_same_fresh_groups() -> None:
    for fraction, settings in beyond.QUESTIONS["mixing"].values.items():
        config = point(0, settings).config()
        assert {step.fresh for step in plan(config)} == {beyond.FRESH_GROUPS}
        share = config.recorded_prompts_per_step / config.prompts_per_step
        assert share == pytest.approx(float(fraction))


def test_recorded_groups_of_a_mixed_step_are_not_those_of_its_fresh_prompts() -> None:
    """A record of all prompts, as the experiments' is, in as many groups as there are prompts."""
    prompts = range(400)
    for seed in range(3):
        same = 0
        for step in range(20):
            fresh = shuffled(prompts, 4 * step, 4, seed)
            same += len({*fresh} & {*in_recorded_order(prompts, 4 * step, 4, seed)})
        assert same < 20  # of 80; by chance about one


def test_stale_samples_are_as_old_as_said() -> None:
    for steps, settings in beyond.QUESTIONS["staleness"].values.items():
        config = point(0, settings).config()
        fresh = [number for number, step in enumerate(plan(config)) if step.fresh]
        assert fresh == list(range(0, config.steps, int(steps) + 1))
    for n, settings in beyond.QUESTIONS["group_size"].values.items():
        config = point(0, settings).config()
        assert config.num_generations == int(n)
        assert config.num_generations * config.prompts_per_step == beyond.SAMPLES


# --- Runs -----------------------------------------------------------------------------------------


def start(_: Point, work: Path, __: int | None) -> Start:
    return Start(work, "", {"12+9=": 0.25})


def test_a_killed_sweep_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def count(one: Point, *_: object) -> Curve:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(one.seed)
        return curve(eval_reward=one.seed / 10)

    def resumed() -> Sweep:
        return Sweep(tmp_path, True, count, start)

    points = [point(seed, {"beta": 0.1}) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        resumed().curves(points)
    assert ran == [0, 1]
    ran.clear()
    again = resumed()
    found = again.curves(points)
    assert ran == [2, 3]
    assert [found[one][-1]["eval_reward"] for one in points] == [0.0, 0.1, 0.2, 0.3]
    assert again.pass_rates(points[0]) == {"12+9=": 0.25}
    assert resumed().curves(points) == found  # nothing is left to run
    ran.clear()
    monkeypatch.setattr(sweep, "version", lambda base: f"{base}@other")
    resumed().curves(points[:1])
    assert ran == [0]


def test_a_known_run_keeps_the_default_it_was_made_with(tmp_path: Path) -> None:
    """A changed default is named in the runs from before, and today's are other runs."""
    ran: list[Point] = []

    def note(one: Point, *_: object) -> Curve:
        ran.append(one)
        return curve(eval_reward=len(ran) / 10)

    def known() -> Sweep:
        return Sweep(tmp_path, True, note, start)

    offline = point(0, {"recorded": language.RECORDED})
    published = point(0, {"recorded": language.RECORDED, "off_policy_taper": 0.0})
    fresh = point(0, {})
    path = tmp_path / "language_defaults.json"
    known().curves([offline, fresh])
    path.write_text(path.read_text().replace('"off_policy_taper": 1.0', '"off_policy_taper": 0.0'))
    ran.clear()
    again = known()
    # The taper is no setting of a run that has no off-policy rows.
    assert again.curves([published, fresh])[published][-1]["eval_reward"] == 0.1 and not ran
    assert again.curves([offline, published])[offline][-1]["eval_reward"] == 0.1
    assert ran == [offline]
    assert json.loads(path.read_text())["off_policy_taper"] == 1.0
    assert len(known().curves([offline, published, fresh])) == 3
    assert ran == [offline]
    # Of a setting that the file does not know, what runs did before there was it: no taper.
    said = json.loads(path.read_text())
    del said["off_policy_taper"], said["beta"]
    path.write_text(json.dumps(said))
    assert len(known().curves([published])) == 1
    assert ran == [offline]
    path.unlink()
    with pytest.raises(Refusal, match="expected .*language_defaults.json, which says what"):
        known()


def threads_of(one: Point, work: Path, recorded_prompts: int | None) -> int:
    return torch.get_num_threads()


def test_runs_of_a_full_figure_have_a_thread_each(tmp_path: Path) -> None:
    points = [point(seed, {}) for seed in range(3)]
    found = dict(Sweep(tmp_path, quick=False)._each(threads_of, points))
    assert found == dict.fromkeys(points, 1)


def test_one_reproduction_at_a_time_in_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Sweep(tmp_path, quick=True)._alone():
        assert main(["reproduce", "fig2", "--quick", f"output_dir={tmp_path}"]) == 2
    assert "another is running; wait for it" in capsys.readouterr().err
    assert Sweep(tmp_path, quick=True).curves([]) == {}


def test_a_run_is_that_of_agro_train(tmp_path: Path) -> None:
    """The room's curve is what its command gives, from a warm start of its own."""
    # Rewards that differ from the first step on, whatever the model knows.
    settings: Mapping[str, object] = {**QUICK, "reward": "tests.train.reward_functions:even_share"}
    one = point(5, settings)
    first, last = measure(one, tmp_path / "work")
    run = tmp_path / "run"
    assert main([*one.command.split()[1:], f"output_dir={run}"]) == 0
    rows = read_jsonl(run / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]
    assert len(steps) == 2
    for name in language.TRAINING:
        assert last[name] == sum(row[name] for row in steps) / 2
    evaluations = [row for row in rows if "eval_reward" in row]
    for mark, row in zip((first, last), evaluations, strict=True):
        assert (mark["eval_reward"], mark["eval_accuracy"]) == (
            row["eval_reward"],
            row["eval_accuracy"],
        )
    assert first["eval_kl"] == 0.0 and last["eval_kl"] != 0.0
    assert (last["learned"], last["sampled"]) == (32, 32)


def test_the_real_models_comparison_is_written_from_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs themselves take minutes each; these curves stand in for them."""

    def reward_of(one: Point, *_: object) -> Curve:
        assert one.base == "smollm2-arithmetic" and one.config().model == "smollm2"
        return curve(eval_reward=0.9 if one.config().lr_weight else 0.7 + one.seed / 10)

    monkeypatch.setattr(smollm2, "Sweep", partial(Sweep, measure=reward_of, make_start=start))
    for figure, run, name in (
        ("smollm2", smollm2.run, "agro"),
        ("offline", offline.run, "agro_tapered"),
    ):
        assert all(claim.holds for claim in run(tmp_path, quick=True))
        assert (tmp_path / f"{figure}.png").stat().st_size > 0
        rows = (tmp_path / f"{figure}_differences.csv").read_text().splitlines()
        assert f"{name},pg_k2,sampled,2,0,0,0,no" in rows


@pytest.fixture(scope="module")
def quick_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all figures' quick runs, which share what they can."""
    return tmp_path_factory.mktemp("quick")


@pytest.mark.parametrize("figure", FIGURES)
def test_quick_run(figure: str, quick_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reproduce", figure, "--quick", f"output_dir={quick_folder}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "FAILS" not in printed and "same number of updates" in printed
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(tables) >= 6
    assert list(quick_folder.glob(f"{figure}*.png")) and list(quick_folder.glob(f"{figure}*.csv"))


@pytest.mark.parametrize("figure", [*FIGURES, "ahead", "smollm2", "offline"])
def test_readme_has_the_tables_of_the_committed_runs_or_says_there_are_none(
    figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (HOME / "README.md").read_text()
    if not list((HOME / "results").glob(f"{figure}*.png")):
        assert f"`agro reproduce {figure}`: **not run yet**" in readme
        return
    for name in ("language_curves.csv", "language_starts.csv", "language_defaults.json"):
        shutil.copy(HOME / "results" / name, tmp_path)
    monkeypatch.setattr(Sweep, "_run", lambda _, missing: pytest.fail("a run") if missing else None)
    # The quick runs write pictures; these would take longer than all tables.
    monkeypatch.setattr(style, "save", lambda *_: None)
    assert main(["reproduce", figure, f"output_dir={tmp_path}"]) == 0
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert tables
    for line in tables:
        assert line in readme
    for path in tmp_path.glob(f"{figure}*.csv"):
        assert path.read_text() == (HOME / "results" / path.name).read_text()
