"""The command `agro`: its commands, and what is shown of an error."""

import contextlib
import errno
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from agro_train import train
from agro_train.cli import COMMANDS, main
from agro_train.commands import plot as plot_command
from agro_train.refusal import Refusal
from tests.train.sentences import refusal

ROOT = Path(__file__).parents[2]


def raises(error: Exception) -> Callable[..., None]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return tmp_path / "run"


def test_agro_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    shown = capsys.readouterr().err
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{re.escape(command.summary[:20])}", shown, flags=re.M), name


def test_mistyped_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "agro: error: expected a command first, got 'trian'; nearest: train; agro alone lists "
        "them all"
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_any_command_with_a_sentence(
    number: int,
    status: int,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plot_command, "plot_run", lambda _: os.kill(os.getpid(), number))
    assert main(["plot", str(run_folder)]) == status
    assert capsys.readouterr().err == f"agro: interrupted by {signal.Signals(number).name}\n"


def test_signal_while_a_run_is_set_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        assert (tmp_path / "run" / ".lock").exists()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("agro_train.setup.load_models", interrupt)
    assert main(["train", f"output_dir={tmp_path / 'run'}"]) == 143
    said = "agro: interrupted by SIGTERM before a step was taken: start it again\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "run").exists()


def test_version_and_help_come_without_torch() -> None:
    program = (
        "import sys; from agro_train.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    for option, expected in (("--version", r"agro (\d+\.\d+\.\d+|\()"), ("--help", "usage: agro ")):
        command = [sys.executable, "-c", program, option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert re.match(expected, done.stdout)


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash."""
    path = tmp_path_factory.mktemp("completion") / "agro.bash"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--print-completion", "bash"]) == 0
    path.write_text(printed.getvalue())
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], {"train"}),
        (["train", "learning_"], {"learning_rate="}),
        (["train", "beta=1", "smollm2-m"], {"smollm2-math"}),
        (["train", "--dr"], {"--dry-run"}),
        (["eval", "a", "eval_pro"], {"eval_prompts="}),
        (["plot", "fi"], {"file"}),
    ],
)
def test_tab_completes_commands_settings_and_files(
    words: list[str], offered: set[str], completion: Path, tmp_path: Path
) -> None:
    if not (bash := shutil.which("bash")):
        pytest.skip("there is no bash")
    (tmp_path / "file").write_text("")
    line = shlex.join(["agro", *words])
    program = (
        f"source {shlex.quote(str(completion))}\n"
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _agro 2>/dev/null\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        [bash, "--norc", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: agro {name} ")
    assert len(shown.split("\n\n")) > 2  # a description between usage and arguments


@pytest.mark.parametrize("arguments", [["trian"], ["--slow"], ["--", "train"], ["train", "--slow"]])
def test_unknown_commands_and_options_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "error: " in capsys.readouterr().err


def test_settings_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny-arithmetic", "steps=7", "--dry-run", "beta=0.5", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 7\n" in shown and "beta: 0.5\n" in shown and "seed: 3\n" in shown


def test_options_of_vllm_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from agro_train.commands import serve

    became: list[list[str]] = []
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve.os, "execve", lambda _, command, __: became.append(command))
    main(["serve", "folder", "--port", "81", "--help"])
    (command,) = became
    assert command[command.index("--model") + 1] == "folder"
    assert command[-3:] == ["--port", "81", "--help"]


def test_refusal_is_one_sentence(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot_command, "plot_run", raises(Refusal("x: expected a, got b")))
    assert refusal(["plot", str(run_folder)], capsys) == "agro: x: expected a, got b\n"


def test_full_disk_is_one_sentence(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(plot_command, "plot_run", raises(full))
    said = refusal(["plot", str(run_folder)], capsys)
    assert "expected room to write, got 'No space left on device'; make room" in said


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "a bug")])
def test_any_other_error_is_raised(
    error: Exception, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot_command, "plot_run", raises(error))
    with pytest.raises(type(error), match="a bug"):
        main(["plot", str(run_folder)])


def test_value_error_inside_a_run_shows_its_traceback_and_exits_1(tmp_path: Path) -> None:
    program = (
        "import agro_train.train as train; from agro_train.cli import main\n"
        "def with_a_bug(run, step): raise ValueError('a bug')\n"
        "train.take_step = with_a_bug\n"
        f"raise SystemExit(main(['train', 'output_dir={tmp_path / 'run'}', 'warm_start_steps=0', "
        "'eval_every=0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback (most recent call last):" in done.stderr
    assert "in with_a_bug" in done.stderr and done.stderr.endswith("ValueError: a bug\n")
    assert "agro: " not in done.stderr


@pytest.mark.parametrize("where", ["agro_train.setup.setup", "agro_train.train.train"])
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_bug_in_training_is_raised(
    kind: type[Exception], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, raises(kind("x")))
    small = ["warm_start_steps=0", "eval_every=0", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(kind, match="^x$"):
        main(["train", *small])


def test_refusal_in_training_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of the engine or the reward, but on one rank alone, as of a damaged record."""
    monkeypatch.setattr(train, "take_step", raises(Refusal("replay: expected a, got b")))
    small = ["warm_start_steps=0", "eval_every=0", f"output_dir={tmp_path / 'run'}"]
    assert main(["train", *small]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "agro: replay: expected a, got b"


def broken_models(folder: Path) -> None:
    for name in ("unknown", "nothing", "cut", "adapter"):
        (folder / name).mkdir()
    (folder / "unknown" / "config.json").write_text('{"model_type": "nonsense"}')
    (folder / "nothing" / "config.json").write_text("{}")
    (folder / "cut" / "config.json").write_text("{")
    (folder / "cut" / "tokenizer_config.json").write_text("{")
    (folder / "adapter" / "adapter_config.json").write_text("{")
    (folder / "rubbish.gguf").write_text("rubbish")


@pytest.mark.parametrize(
    "name", ["unknown", "nothing", "cut", "adapter", "rubbish.gguf", "absent", "a/b/c/d"]
)
def test_model_that_cannot_be_loaded_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken_models(tmp_path)
    said = refusal(["train", f"model={name}", "output_dir=run"], capsys)
    assert said.startswith("agro: model: expected ") and f"got {name!r}" in said
    assert not (tmp_path / "run").exists()


def test_attention_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a tokenizer or a model is loaded."""
    monkeypatch.setattr("agro_train.setup.load_tokenizer", lambda _: pytest.fail("too late"))
    settings = ["attn_implementation=flash_attention_2", "share_prompts=false"]
    small = ["warm_start_steps=0", f"output_dir={tmp_path / 'run'}"]
    if torch.cuda.is_available():
        pytest.skip("it may be installed")
    said = refusal(["train", *settings, *small], capsys)
    assert said == (
        "agro: attn_implementation: expected one that works here, got flash_attention_2: the "
        "package flash-attn is not installed: pip install --no-build-isolation flash-attn, or set "
        "attn_implementation=sdpa\n"
    )


def test_vllm_that_is_not_installed_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agro_train.setup.load_tokenizer", lambda _: pytest.fail("too late"))
    if importlib.util.find_spec("vllm"):
        pytest.skip("it is installed")
    said = refusal(["train", "use_vllm=true", f"output_dir={tmp_path / 'run'}"], capsys)
    assert said.startswith("agro: use_vllm: expected the package vllm, got none; pip install ")
    assert not (tmp_path / "run").exists()


def test_checkpointing_that_a_model_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    small = ["warm_start_steps=0", f"output_dir={tmp_path / 'run'}"]
    said = refusal(["train", "gradient_checkpointing=true", *small], capsys)
    assert "gradient_checkpointing: expected false for LlamaForCausalLM, got true: " in said


def test_launch_that_accelerate_refuses_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ValueError("environment variable MASTER_ADDR expected, but not set")
    monkeypatch.setattr(Accelerator, "__init__", raises(missing))
    said = refusal(["train", f"output_dir={tmp_path / 'run'}"], capsys)
    assert "accelerate launch: expected " in said and "MASTER_ADDR" in said


@pytest.mark.parametrize("state", ["{", '{"step": 1}', '{"of": "another version"}'])
def test_checkpoint_that_cannot_be_read_is_refused(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trainer_state.json").write_text(state)
    said = refusal(["eval", str(tmp_path)], capsys)
    assert "model: expected a checkpoint as it was written, got " in said


@pytest.mark.parametrize(
    "column", [{"columns": "text"}, {"prompt_ids": 3}, {"completion_ids": {"a": 1}}]
)
def test_column_of_another_type_is_refused(
    column: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = column
    (tmp_path / "r.jsonl").write_text(json.dumps({"completion": "3", "answer": "3", **column}))
    said = refusal(["score", str(tmp_path / "r.jsonl"), "reward=number"], capsys)
    kind = "dict" if name == "columns" else "list"
    assert f"score: expected {kind} as {name} in " in said and "line 1" in said


def test_folder_is_no_file_to_score(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("/", ""):
        said = refusal(["score", name, "reward=number"], capsys)
        assert "score: expected a file of rows, got" in said


def test_report_of_a_run_with_a_broken_configuration_is_refused(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "config.yaml").write_text("beta: [\n")
    said = refusal(["report", str(run_folder)], capsys)
    assert f"config: expected a YAML file, got {run_folder / 'config.yaml'}: " in said
