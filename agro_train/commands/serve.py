"""`agro serve`: a vLLM server that a run samples from."""

import argparse
import importlib.util
import os

from agro_train.engines.vllm_server import serve_command
from agro_train.refusal import Refusal

DESCRIPTION = (
    "Start vLLM's own server, set up to take the weights of runs with use_vllm=true "
    "vllm_mode=server. MODEL is a folder or hub id of the run's model; options of vllm serve may "
    "follow it (--port, --dtype, --max-model-len, --tensor-parallel-size)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTIONS")


def run(options: argparse.Namespace) -> int:
    """Becomes the server: it does not return."""
    if importlib.util.find_spec("vllm") is None:
        raise Refusal(
            "serve: expected the package vllm, got none; pip install '.[vllm]' in this project's "
            "folder"
        )
    command, environment = serve_command(options.model, options.options)
    os.execve(command[0], command, environment)
