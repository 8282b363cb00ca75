"""Where a configuration comes from: a YAML file, and `key=value` arguments over it.

An unknown key, a value of the wrong type and a combination that cannot work are refused before
anything is loaded. `python -m agro_train.config > docs/configuration.md` writes the list of keys.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agro_train.keys import as_markdown, nearest, unknown
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder
from agro_train.settings import KEYS, TrainConfig

__all__ = ["TrainConfig", "find", "from_arguments", "load", "load_resumed", "page", "shipped"]

PAGE = """\
# Configuration

All settings of a run, with the defaults that hold where nothing else is said. They stand as
`key: value` in a YAML file, and as `key=value` on the command line of `agro train`, `agro rollout`
and `agro eval`, where they go over the file's. `agro train my.yaml steps=10 --dry-run` prints what
is then set. Without a file, and with `model` and `data` left alone, the settings are those of the
shipped `tiny-arithmetic`.

A list may be written without its brackets: `recorded=a.jsonl,b.jsonl`. `${key}` stands for another
setting's value: `output_dir: runs/beta-${beta}`. A key with * may change when a run is resumed:
`agro train --resume DIR steps=200`.

This page is made by `python -m agro_train.config > docs/configuration.md`.

"""


def page() -> str:
    """The text of docs/configuration.md."""
    return PAGE + as_markdown(KEYS.values())


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(str(resources.files("agro_train") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """A configuration's file, from its path or the name of a shipped one."""
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).stem
    if stem in shipped() and name in (stem, f"{stem}.yaml", f"configs/{stem}.yaml"):
        return shipped()[stem]
    raise Refusal(
        f"config: expected a YAML file or one of {', '.join(shipped())}, got {name!r}; "
        f"{nearest(stem, shipped())}there is no such file"
    )


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a YAML file with `key=value` overrides.

    Without a file (None) it is the shipped tiny-arithmetic, but only where the overrides leave
    model and data alone: its learning rate and its 24 tokens are that model's. Recorded files
    without data, where every group comes from them, go without: data is then empty.
    """
    changes = read_overrides(overrides)
    if path is not None:
        return _built(_read_file(Path(path)), changes)
    defaults = TrainConfig()
    alone = all(
        changes.get(name, getattr(defaults, name)) == getattr(defaults, name)
        for name in ("model", "data")
    )
    file = _read_file(find("tiny-arithmetic")) if alone else {}
    file.pop("data", None)  # nobody has asked for it
    return _built(file, changes)


def _built(file: dict[Any, Any], changes: dict[Any, Any]) -> TrainConfig:
    """The configuration of what a file has and a command line changes."""
    given = _resolved({**file, **changes})
    for name in given:
        if name not in KEYS:
            raise unknown(str(name), KEYS)
    values = {name: KEYS[name].read(value) for name, value in given.items()}
    if "steps" in changes and not changes.get("num_train_epochs"):
        values["num_train_epochs"] = 0.0  # the later word counts
    elif "steps" in changes:
        raise Refusal(
            f"num_train_epochs: expected it or steps, got {values['num_train_epochs']:g} and steps="
            f"{values['steps']}; leave one of them out"
        )
    config = TrainConfig(**values)
    if config.offline and "data" not in given:
        config = replace(config, data="")
    config.check()
    return config


def from_arguments(words: Sequence[str]) -> TrainConfig:
    """The configuration of a command line: a file or a shipped one's name, and `key=value`."""
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise Refusal(f"arguments: expected one configuration, got {', '.join(names)}")
    return load(find(names[0]) if names else None, overrides)


def load_resumed(folder: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of the run in `folder`, with only what may change in mid-run overridden."""
    path = RunFolder(folder).config
    if not path.is_file():
        raise Refusal(
            f"--resume: expected the folder of a run, got {str(folder)!r}; it has no config.yaml: "
            "no run has begun there, so start one, with the configuration, "
            f"output_dir={folder} and no --resume"
        )
    resumable = [name for name, key in KEYS.items() if key.resumable]
    file = _read_file(path)
    for override in overrides:
        if "=" not in override:
            raise Refusal(
                f"arguments: expected no configuration with --resume, got {override}; "
                "the run's own config.yaml is used"
            )
        name = override.partition("=")[0]
        if name not in KEYS:
            raise unknown(name, KEYS)
        if name not in resumable:
            raise Refusal(
                f"{name}: expected only {', '.join(resumable)} with --resume, got {override}; "
                "the rest continues as it began"
            )
    older = {name: key.older for name, key in KEYS.items() if key.older is not None}
    config = _built({**older, **file}, read_overrides(overrides))
    return replace(config, output_dir=str(folder))


def _read_file(source: Path) -> dict[Any, Any]:
    try:
        given = OmegaConf.load(source)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise Refusal(
            f"config: expected a YAML file, got {source}: {' '.join(str(error).split())}"
        ) from error
    if not OmegaConf.is_dict(given):
        raise Refusal(f"config: expected keys and values in {source}, got a list")
    values: dict[Any, Any] = OmegaConf.to_container(given)
    return values


def read_overrides(overrides: Sequence[str]) -> dict[Any, Any]:
    """What `key=value` arguments say, as YAML reads the values."""
    changes = OmegaConf.create()
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not (name and equals):
            raise Refusal(f"arguments: expected key=value, got {override!r}")
        try:
            changes.merge_with_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise Refusal(
                f"{name}: expected a value as YAML has it, got {override}: "
                f"{' '.join(str(error).split())}"
            ) from error
    values: dict[Any, Any] = OmegaConf.to_container(changes)
    return values


def _resolved(given: dict[Any, Any]) -> dict[Any, Any]:
    """The same with what `${key}` stands for in its place; the key may have its default."""
    if "${" not in str(given):
        return given
    try:
        whole = OmegaConf.create({**asdict(TrainConfig()), **given})
        values: dict[Any, Any] = OmegaConf.to_container(whole, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise Refusal(f"config: expected values that can be resolved, got {reason}") from error
    return values


if __name__ == "__main__":
    print(page(), end="")
