"""The command `agro`. Errors of the user's are one sentence and exit status 2."""

import argparse
import gc
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from agro_train import config as configuration
from agro_train.experiments import FIGURES, reproduce
from agro_train.refusal import Refusal

DESCRIPTION = "Fine-tune a language model with AGRO."
TRAIN = (
    "Run a configuration: the path of a YAML file or the name of a shipped one (without it: a tiny "
    "model that needs no download), with key=value settings after it."
)
ROLLOUT = (
    "Sample num_generations completions for every training prompt of a configuration, score them, "
    "and write a file that recorded= takes; model= may be a run's folder or checkpoint."
)
SCORE = "Score a file's completions: reward=NAME or reward=[NAME,...], reward_weights=[...]."
EVAL = (
    "pass@1, pass@k and maj@k on held-out prompts. A run's own configuration is used, with "
    "key=value settings over it."
)
PLOT = (
    "Draw the curves of a run, or of several against each other. Runs whose configurations differ "
    "in nothing but seed and names are one curve, with a band from the lowest to the highest."
)
REPORT = "Write one HTML page about a run that needs no other file. A finished run has one already."
SERVE = (
    "Start vLLM's own server, set up to take the weights of runs with use_vllm=true "
    "vllm_mode=server. MODEL is a folder or hub id of the run's model; options of vllm serve may "
    "follow it (--port, --dtype, --max-model-len, --tensor-parallel-size)."
)
REPRODUCE = (
    "Run one of the paper's experiments, write its tables and plots to output_dir (default: "
    "runs/FIGURE), and print what it shows; exit status 1 if it does not show it."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agro", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    train_command = commands.add_parser("train", help="train a model", description=TRAIN)
    train_command.add_argument("settings", nargs="*", metavar="CONFIG | key=value")
    train_command.add_argument("--resume", metavar="DIR", help="continue the run in this folder")
    train_command.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    rollout_command = commands.add_parser(
        "rollout",
        help="record completions of a model, a dataset for recorded=",
        description=ROLLOUT,
    )
    rollout_command.add_argument("settings", nargs="*", metavar="CONFIG | key=value")
    rollout_command.add_argument("--output", help="default: OUTPUT_DIR/recorded.jsonl")
    rollout_command.add_argument("--prompts", type=int, help="how many prompts; default: all")
    score_command = commands.add_parser(
        "score", help="write rewards into a copy of a rollouts file", description=SCORE
    )
    score_command.add_argument("file", help="rollouts, .jsonl or .parquet")
    score_command.add_argument("settings", nargs="+", metavar="reward=...")
    score_command.add_argument("--output", help="default: FILE with .scored.jsonl at its end")
    eval_command = commands.add_parser(
        "eval", help="evaluate a run, a checkpoint or a model", description=EVAL
    )
    eval_command.add_argument("model", metavar="RUN_OR_CHECKPOINT")
    eval_command.add_argument("settings", nargs="*", metavar="key=value")
    plot_command = commands.add_parser("plot", help="draw and compare runs", description=PLOT)
    plot_command.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    plot_command.add_argument("--output", metavar="DIR", help="default: ./plots; RUN/plots for one")
    report_command = commands.add_parser(
        "report", help="write a run's page: curves, configuration, completions", description=REPORT
    )
    report_command.add_argument("run", metavar="RUN", help="output folder of a run")
    report_command.add_argument("--output", metavar="FILE", help="default: RUN/report.html")
    serve_command = commands.add_parser(
        "serve", help="start a vLLM server that a run samples from", description=SERVE
    )
    serve_command.add_argument("model", metavar="MODEL")
    serve_command.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTIONS")
    reproduce_command = commands.add_parser(
        "reproduce", help="run an experiment of the paper", description=REPRODUCE
    )
    reproduce_command.add_argument("figure", metavar="FIGURE", help=", ".join(FIGURES))
    reproduce_command.add_argument("settings", nargs="*", metavar="output_dir=DIR")
    reproduce_command.add_argument("--quick", action="store_true", help="small, in seconds")
    options, late = parser.parse_known_args(arguments)
    # argparse takes no more positionals after an option; settings may stand there too.
    if late and ("settings" not in options or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        options.settings += late
    if options.command == "reproduce":
        return _reproduce(options.figure, options.settings, options.quick)
    if options.command == "serve":
        return _serve(options.model, options.options)
    if options.command == "plot":
        return _plot([Path(run) for run in options.runs], options.output)
    if options.command == "report":
        return _report(Path(options.run), options.output)
    if options.command == "rollout":
        return _rollout(options.settings, options.output, options.prompts)
    if options.command == "score":
        return _score(Path(options.file), options.settings, options.output)
    if options.command == "eval":
        return _eval(options.model, options.settings)
    return _train(options.settings, options.resume, options.dry_run)


def _train(settings: Sequence[str], resume: str | None, dry_run: bool) -> int:
    try:
        config = _config(settings, resume)
    except ValueError as error:
        return _refuse(error)
    if dry_run:
        print(config.to_yaml(), end="")
        return 0
    from agro_train.engines.engine import BrokenEngine
    from agro_train.rewards.functions import BrokenReward
    from agro_train.setup import setup  # imports transformers, which a dry run does not need
    from agro_train.train import train

    try:
        run = setup(config, resume=resume is not None)
    except ValueError as error:
        return _refuse(error)
    except Exception as error:
        return _refuse(_full_disk(error, config.output_dir))
    status = 0
    try:
        train(run)
    except (BrokenReward, BrokenEngine) as error:
        status = _refuse(error)
        run.accelerator.end_training()
    except Exception as error:
        status = _refuse(_full_disk(error, config.output_dir))
        # Not end_training: the other ranks are in a collective, and to leave its group takes all.
        for tracker in run.accelerator.trackers:
            tracker.finish()
    # The wrapped models are cycles that hold the process group. Collected here its threads are
    # joined; left to the interpreter's end they are sometimes found running, which aborts.
    del run
    gc.collect()
    return status


def _full_disk(error: Exception, folder: str) -> Refusal:
    """The sentence for a disk that takes no more. Any other error deserves its traceback."""
    from agro_train.durable import no_room

    reason = no_room(error)
    if reason is None:
        raise error
    started = (Path(folder) / "config.yaml").is_file()
    return Refusal(
        f"output_dir: expected room to write to {folder!r}, got {reason!r}; what was saved before "
        f"is whole: make room and {f'go on with --resume {folder}' if started else 'start again'}"
    )


def _rollout(settings: Sequence[str], output: str | None, prompts: int | None) -> int:
    try:
        config = _config(settings, None)
        if prompts is not None and prompts < 1:
            raise Refusal(f"--prompts: expected at least 1, got {prompts}")
        path = Path(output) if output else Path(config.output_dir) / "recorded.jsonl"
        from agro_train.commands.record import record  # imports transformers

        written, left_out = record(config, path, prompts)
    except ValueError as error:
        return _refuse(error)
    if any(left_out.values()):
        print(f"prompts left out: {_reasons(left_out)}")
    print(f"{path}: {written} completions; train on them with recorded=[{path}]")
    return 0


def _score(source: Path, settings: Sequence[str], output: str | None) -> int:
    from agro_train.commands.score import SCORE_KEYS, score_file

    try:
        for setting in settings:
            if setting.partition("=")[0] not in SCORE_KEYS:
                raise Refusal(f"arguments: expected {', '.join(SCORE_KEYS)}, got {setting!r}")
        if not any(setting.startswith("reward=") for setting in settings):
            raise Refusal("reward: expected reward=FUNCTION, got none; which shall score them?")
        path = Path(output) if output else source.with_suffix(".scored.jsonl")
        found = score_file(source, configuration.load(None, settings), path)
    except ValueError as error:
        return _refuse(error)
    print(
        f"{path}: {found['rows']:.0f} completions, mean reward {found['mean']:.3f}, "
        f"{found['without']:.0f} without one"
    )
    return 0


def _reasons(left_out: Mapping[str, int]) -> str:
    return (
        f"{left_out['too_long']} as too long, "
        f"{left_out['unreadable_gold']} as their gold answer cannot be parsed"
    )


def _eval(model: str, settings: Sequence[str]) -> int:
    from agro_train.commands.evaluate import evaluate_model

    try:
        folder, found, left_out = evaluate_model(model, settings)
    except ValueError as error:
        return _refuse(error)
    if any(left_out.values()):
        print(f"held-out prompts left out: {_reasons(left_out)}")
    print("95 % intervals: bootstrap over the prompts")
    for name, estimate in found.items():
        print(f"{name:>9}  {estimate.value:.3f}  [{estimate.low:.3f}, {estimate.high:.3f}]")
    print(f"Results and every sample are in {folder}")
    return 0


def _serve(model: str, options: Sequence[str]) -> int:
    if importlib.util.find_spec("vllm") is None:
        return _refuse(
            ValueError(
                "serve: expected the package vllm, got none; pip install '.[vllm]' in this "
                "project's folder"
            )
        )
    from agro_train.engines.vllm_client import serve_command

    command, environment = serve_command(model, options)
    os.execve(command[0], command, environment)


def _reproduce(figure: str, settings: Sequence[str], quick: bool) -> int:
    output_dir = f"runs/{figure}"
    try:
        if figure not in FIGURES:
            raise Refusal(f"figure: expected one of {', '.join(FIGURES)}, got {figure!r}")
        for setting in settings:
            key, _, output_dir = setting.partition("=")
            if key != "output_dir" or not output_dir:
                raise Refusal(f"arguments: expected output_dir=DIR, got {setting!r}")
    except ValueError as error:
        return _refuse(error)
    try:
        return 0 if reproduce(figure, Path(output_dir), quick) else 1
    except BlockingIOError as error:  # another one is at work in the folder
        return _refuse(error)


def _config(settings: Sequence[str], resume: str | None) -> configuration.TrainConfig:
    overrides = [setting for setting in settings if "=" in setting]
    names = [setting for setting in settings if "=" not in setting]
    if len(names) > 1:
        raise Refusal(f"arguments: expected one configuration, got {', '.join(names)}")
    if resume is None:
        return configuration.load(configuration.find(names[0]) if names else None, overrides)
    if names:
        raise Refusal(
            f"arguments: expected no configuration with --resume, got {names[0]}; "
            "the run's own config.yaml is used"
        )
    return configuration.load_resumed(Path(resume), overrides)


def _refuse(error: ValueError | OSError) -> int:
    print(f"agro: {error}", file=sys.stderr)
    return 2


def _plot(runs: Sequence[Path], output: str | None) -> int:
    from agro_train.watch.plots import plot_comparison, plot_run

    try:
        for run in runs:
            _check_run(run, "plot")
        if len(runs) == 1 and output is None:
            written = plot_run(runs[0])
        else:
            written = plot_comparison(runs, Path(output or "plots"))
    except ValueError as error:
        return _refuse(error)
    for path in written:
        print(path)
    return 0


def _report(run: Path, output: str | None) -> int:
    from agro_train.watch.report import write_report

    try:
        _check_run(run, "report")
        print(write_report(run, Path(output) if output else None))
    except ValueError as error:
        return _refuse(error)
    return 0


def _check_run(run: Path, command: str) -> None:
    if not (run / "metrics.jsonl").is_file():
        raise Refusal(
            f"{command}: expected the folder of a run, got {str(run)!r}; it has no metrics"
        )


if __name__ == "__main__":
    raise SystemExit(main())
