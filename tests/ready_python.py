"""A Python that has imported masformer already, for a script that begins many: importing costs each seven seconds.

`-m masformer` and `-c` run in a fork of one process, with the arguments, environment, folder and files of the caller.
"""

import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

CALLER = """#!{python} -IS
import json, os, socket, sys
words = sys.argv[1:]
if words[0] != "-c" and words[:2] != ["-m", "masformer"]:
    os.execv("{python}", ["{python}", *words])
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
socket.send_fds(server, [json.dumps([words, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
server.shutdown(socket.SHUT_WR)
sys.exit(server.recv(1)[0])
"""


@contextmanager
def ready_python(folder, **variables):
    """The path of such a Python; torch, which reads some variables when it is imported, is given these."""
    address, python = folder / "s", folder / "python"
    words = [sys.executable, __file__, address]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | variables) as server:
        try:
            assert server.stdout.readline() == b"ready\n"
            python.write_text(CALLER.format(python=sys.executable, address=address))
            python.chmod(0o755)
            yield str(python)
        finally:
            server.kill()


def serve(address):
    import masformer.cli
    import masformer.demo
    import masformer.study  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    gc.freeze()  # the collector need not walk through what is imported, and leaves its pages shared
    print("ready", flush=True)
    while True:
        caller, _ = listener.accept()
        process = os.fork()
        if process == 0:
            listener.close()
            code = answer(caller)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
        _, status = os.waitpid(process, 0)
        caller.send(bytes([os.waitstatus_to_exitcode(status) % 256]))
        caller.close()


def answer(caller):
    """Runs what a caller asks for; gives its exit status."""
    message, files, *_ = socket.recv_fds(caller, 1 << 20, 3)
    while more := caller.recv(1 << 20):
        message += more
    (first, second, *rest), folder, environment = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if first == "-c":
            sys.argv = ["-c", *rest]
            exec(second, {"__name__": "__main__"})
        else:
            sys.argv = [second, *rest]
            runpy.run_module(second, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(str(Path(sys.argv[1])))
