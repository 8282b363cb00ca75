"""Runs as processes of their own, forked from one that has imported what they need: that takes
several times as long as a run.

`Server` is in the test; `python -m tests.train.forked` is the process that it forks them from.
"""

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


class Server:
    """Starts runs and says how they ended: the forks of one warmed process, one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, *settings: str, again: Sequence[str] = (), **how: Any) -> int:
        """The exit status of `agro train`, new in the folder or going on there, `launch`ed.

        Args:
            again: settings that a run that goes on is given.
        """
        resumed = (folder / "config.yaml").is_file()
        there = ["--resume", str(folder), *again]
        arguments = there if resumed else [f"output_dir={folder}", *settings]
        return self.launch(folder, ["train", *arguments], **how)

    def launch(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        ranks: int = 1,
        kill_after: float | None = None,
        victims: Sequence[int] = (0,),
        **job: Any,
    ) -> int:
        """The exit status of `agro` with these arguments, whose run is in the folder: KILLED where
        any rank of it was.

        Args:
            kill_after: seconds until the victims are killed.
            victims: the ranks that kill_after and kill_at mean.
            job: draw: whether it draws its curves, which takes longer than all the rest. kill_at: a
                number n or a moment; the victims are killed at the n-th write to the folder, or at
                that one. signal: what they are sent instead of being killed. file_size: bytes that
                no file of the run may exceed. grace: seconds that the other ranks have after one
                has failed, before they are ended, too.
        """
        job |= {"arguments": list(arguments), "folder": str(folder)}
        job |= {"ranks": ranks, "victims": victims}
        assert self.process.stdin and self.process.stdout, "both are pipes"
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pids = json.loads(self.process.stdout.readline())
        if kill_after is not None:
            select.select([self.process.stdout], [], [], kill_after)
            for victim in victims:
                try:
                    os.kill(pids[victim], signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it had come to its end
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout, "both are pipes"
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve() -> None:
    """Forks a run for every line of standard input, and prints the process ids of its ranks and how
    it ended."""
    import agro_train.train  # noqa: F401  what a run needs, once for all of them

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        ranks = job["ranks"]
        Path(f"{job['folder']}.log").write_bytes(b"")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        pids = [0] * ranks
        for rank in reversed(range(ranks)):  # the main one last: it knows the others
            pids[rank] = os.fork()
            if pids[rank] == 0:
                if ranks > 1:
                    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
                    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in place.items()})
                pids[rank] = os.getpid()
                be_a_run(job, [pids[victim] for victim in job["victims"]] if rank == 0 else [])
        print(json.dumps(pids), flush=True)
        print(ended(pids, job.get("grace", 0.0)), flush=True)


def ended(pids: Sequence[int], grace: float) -> int:
    """How the ranks ended. As a launcher does, it ends all when one has failed."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, 0)
        if status != 0 and not any(statuses.values()):
            time.sleep(grace)
            for other in set(pids) - {pid} - statuses.keys():
                os.kill(other, signal.SIGTERM)
        statuses[pid] = os.waitstatus_to_exitcode(status)
    failed = [status for status in statuses.values() if status]
    return KILLED if KILLED in failed else (failed or [0])[0]


def be_a_run(job: dict[str, Any], victims: Sequence[int]) -> None:
    """Args: victims: the processes that kill_at means; none on ranks that write nothing."""
    import agro_train.train
    from agro_train.cli import main
    from tests.train.rank_main import check_threads

    if not job.get("draw"):
        for name in ("plot_run", "write_report"):
            setattr(agro_train.train, name, lambda folder: None)
    log = os.open(f"{job['folder']}.log", os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if (file_size := job.get("file_size")) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if victims and (kill_at := job.get("kill_at")) is not None:
        kill_at_write(job["folder"], kill_at, victims, job.get("signal", signal.SIGKILL))
    status = 1
    try:
        ended = main(job["arguments"])
        check_threads(job["arguments"])
        status = ended
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill_at_write(
    folder: str, at: int | list[str], victims: Sequence[int], number: int = signal.SIGKILL
) -> None:
    """Kills processes at this one's n-th write to the folder, or at one of a kind and name; or
    sends them another signal."""
    writes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal writes
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return
        path = str(arguments[0])
        if not path.startswith(folder) or (event == "open" and arguments[1] == "r"):
            return
        writes += 1
        if writes == at or (isinstance(at, list) and event == at[0] and path.endswith(at[1])):
            for victim in sorted(victims, key=lambda pid: pid == os.getpid()):  # itself the last
                os.kill(victim, number)

    sys.addaudithook(watch)


def said(folder: Path) -> str:
    """What the ranks of the last run in the folder have printed."""
    return folder.with_name(f"{folder.name}.log").read_text()


if __name__ == "__main__":
    serve()
