"""Python processes of tests, forked from one that has imported everything.

Importing a backend takes seconds of processor time. A process per worker does
it once, and starts no thread and no device; the others are forked from it, as
`multiprocessing` does by its "forkserver".
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.reduction
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
import warnings
from types import SimpleNamespace

ROOT = pathlib.Path(__file__).parents[1]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])


def run(*arguments, cwd=ROOT, timeout=None, **environment):
    """What a process prints, and its `returncode`, as of `subprocess.run`.

    Args:
        *arguments: As after `python`: `-m module`, `-c program` or a file, and
            arguments.
        cwd: Folder to run in.
        timeout: Optional seconds.
        **environment: Variables to set; the backend is that of the test.
    """
    process = Process(*arguments, cwd=cwd, **environment)
    stdout, stderr = process.communicate(timeout)
    return SimpleNamespace(
        returncode=process.returncode, stdout=stdout, stderr=stderr
    )


class Handle:
    """A file descriptor, which is handed over to a process."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return _received, (multiprocessing.reduction.DupFd(self.number),)


def _received(duplicate):
    return duplicate.detach()


class Process:
    """A process that runs, in the manner of `subprocess.Popen`.

    Args:
        *arguments: As of `run`.
        cwd: As of `run`.
        output: Optional open file to print to; `stdout` and `stderr` if None.
        **environment: As of `run`.
    """

    def __init__(self, *arguments, cwd=ROOT, output=None, **environment):
        self.args = [str(x) for x in arguments]
        pipes = [] if output is not None else [os.pipe(), os.pipe()]
        writers = [y for _, y in pipes] or 2 * [os.dup(output.fileno())]
        self._process = FORKED.Process(
            target=_main,
            args=(
                self.args,
                str(cwd),
                {**os.environ, **environment},
                [Handle(x) for x in writers],
            ),
        )
        self._process.start()
        for writer in set(writers):
            os.close(writer)
        self.stdout, self.stderr = [open(x) for x, _ in pipes] or (None, None)

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"{self.args} after {timeout} seconds")
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait_until_stopped(self):
        """By SIGSTOP, or at its end."""
        stat = pathlib.Path(f"/proc/{self.pid}/stat")
        with contextlib.suppress(FileNotFoundError):
            while stat.read_text().rpartition(")")[2].split()[0] not in "TZ":
                time.sleep(0.001)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """Returns what it prints until it ends: stdout and stderr."""
        texts = ["", ""]

        def read(i, file):
            texts[i] = file.read()

        threads = [
            threading.Thread(target=read, args=x, daemon=True)
            for x in enumerate((self.stdout, self.stderr))
        ]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        return tuple(texts)


def _main(arguments, cwd, environment, writers):
    """What a forked process does, as `python` with these arguments."""
    for name, number, writer in zip(
        ("stdout", "stderr"), (1, 2), writers, strict=True
    ):
        os.dup2(writer, number)
        setattr(sys, name, open(number, "w", closefd=False))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    warnings.simplefilter("error", SyntaxWarning)
    sys.path.insert(0, cwd)
    kind, *others = arguments
    try:
        if kind == "-c":
            sys.argv = ["-c", *others[1:]]
            code = compile(others[0], "<string>", "exec")
            exec(code, {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = others
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = os.path.dirname(os.path.abspath(kind))
            runpy.run_path(kind, run_name="__main__")
    finally:
        # `multiprocessing` leaves them out.
        with contextlib.suppress(SystemExit):
            atexit._run_exitfuncs()
