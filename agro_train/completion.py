"""What the shell offers when Tab is pressed after `agro`: a script that shtab makes of the parsers,
with the settings as words that end in "="."""

import argparse

from agro_train.config import shipped
from agro_train.refusal import Refusal
from agro_train.settings import KEYS

# The names of files are offered, too: a configuration of one's own, a run's folder.
SETTINGS = {
    "bash": """\
_agro_settings() {{
  compgen -W "{words}" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": """\
_agro_settings() {{
  compadd -S '' -- {words}
  _files
}}
""",
}
# A setting's value follows at once, so no space may.
WITHOUT_SPACE = """
_agro() {
  _shtab_agro "$@"
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -o bashdefault -F _agro agro
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `shell`, one of those in SETTINGS.

    Args:
        parser: agro's, with the arguments of every command.
    """
    try:
        import shtab  # no other command needs it
    except ImportError as error:
        raise Refusal(
            "--print-completion: expected the package shtab, got none; pip install shtab"
        ) from error
    words = " ".join([*shipped(), *(f"{name}=" for name in KEYS)])
    for action in _actions(parser):
        if action.dest == "settings":
            action.complete = dict.fromkeys(SETTINGS, "_agro_settings")  # type: ignore[attr-defined]
        elif action.dest in ("model", "file", "run_folder", "runs", "resume", "output"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    found = shtab.complete(parser, shell, preamble=SETTINGS[shell].format(words=words))
    return str(found) + (WITHOUT_SPACE if shell == "bash" else "")


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The parser's arguments and those of its commands."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            found += [each for command in action.choices.values() for each in _actions(command)]
    return found
