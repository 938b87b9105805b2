"""Starts a script in several real processes and, if it hangs, shows where each one stands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
TIMEOUT = 150


def launch(output, script, *arguments, processes=2):
    """Run `script OUTPUT ARGUMENTS...` under torchrun, or alone for one process.

    Output goes to a file: a pipe would stay open as long as any process that inherited it.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += [str(HERE / script), str(output), *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "PYTHONFAULTHANDLER": "1",  # SIGABRT prints the stacks of all threads
        "OMP_NUM_THREADS": "1",
    }
    log = Path(output) / f"{Path(script).stem}-{processes}.log"
    with log.open("w") as stream:
        running = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True
        )
        try:
            code = running.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            _abort(running.pid)
            running.wait()
            raise AssertionError(
                f"{script} hangs after {TIMEOUT} s:\n{log.read_text()[-20000:]}"
            ) from None
    assert code == 0, log.read_text()[-5000:]


def _abort(pid):
    """SIGABRT to the workers, then to the launcher, with time for the stacks to be written."""
    launcher = psutil.Process(pid)
    for process in [*launcher.children(recursive=True), launcher]:
        try:
            process.send_signal(signal.SIGABRT)
        except psutil.NoSuchProcess:
            continue
        time.sleep(1)
