"""Processes that begin where masformer is imported: forked from one that imported it, once for all tests of a worker.

A process of its own costs six seconds of imports; one that is forked costs none, and is killed, stopped and joined to
others as well. torchrun and accelerate are tried by test_distributed.py.
"""

import gc
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from torch.distributed import TCPStore

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["masformer.cli", "masformer.models.checkpoint", "masformer.training.run", "peft", "torch.distributed.fsdp"]
)


def begin(target, words, variables, outputs):
    gc.freeze()  # the collector need not walk through what was imported
    os.environ |= variables
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(target(*words))


def run(target, *words, count=1):
    """What `target(*words)` returned, said and complained in a process, or in the first of `count` that torch joins."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common = {}
        if count > 1:  # as torchrun says it
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": count}
            common |= {"LOCAL_WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        running = []
        for rank in range(count):
            variables = common | ({"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {})
            outputs = [str(folder / f"{rank}.{name}") for name in ("out", "err")]
            variables = {name: str(value) for name, value in variables.items()}
            process = processes.Process(target=begin, args=(target, list(map(str, words)), variables, outputs))
            process.start()
            running.append(process)
        for process in running:
            process.join()
        out, err = ((folder / f"0.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(words, running[0].exitcode, out, err)


def command(*words):
    from masformer.cli import main

    return main(words)


def interrupted(number, step, last, *words):
    """A run that gets a signal at some moment after a step and before its last one, however slow the machine is."""
    from transformers import Trainer

    number, step, last = int(number), int(step), int(last)
    training_step = Trainer.training_step

    def interrupt():
        if number == signal.SIGKILL:
            time.sleep(random.random() / 50)
        os.kill(os.getpid(), number)

    def counted(self, *args, **options):
        if self.state.global_step >= step and thread.ident is None:
            thread.start()
        if self.state.global_step == last - 1:
            thread.join()
        return training_step(self, *args, **options)

    thread = threading.Thread(target=interrupt)
    Trainer.training_step = counted
    return command(*words)


def limited(size, *words):
    """A command whose files the kernel refuses to let grow further, as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size),) * 2)
    return command(*words)
