"""Runs the project's scripts as a user would, and reads what they log."""

import gc
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from tempfile import TemporaryFile
from types import SimpleNamespace


def run(root, *command, **environment):
    """Runs a command and returns its result with ``returncode``, and all that it printed.

    Python's commands start in a copy of a process that has imported the libraries: that spares most
    of the time of a short command. Those whose imports matter start by themselves: other programs,
    and what is given an environment.
    """
    python, *arguments = map(str, command)
    if python == sys.executable and not environment:
        return _run_in_a_copy(root, arguments)
    result = subprocess.run(
        [str(part) for part in command],
        cwd=root,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
            **environment,
        },
    )
    return result, result.stdout + result.stderr


def _run_in_a_copy(root, arguments):
    with TemporaryFile('w+') as out, TemporaryFile('w+') as err:
        streams = [os.dup(file.fileno()) for file in (out, err)]
        process = _server().Process(
            target=_run_script,
            args=(root, arguments, {**os.environ}, *map(multiprocessing.reduction.DupFd, streams)),
        )
        process.start()
        process.join()
        for stream in streams:
            os.close(stream)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    result = SimpleNamespace(returncode=process.exitcode, stdout=texts[0], stderr=texts[1])
    return result, ''.join(texts)


@cache
def _server():
    server = multiprocessing.get_context('forkserver')
    libraries = ('mmdet', 'mmseg', 'mmpretrain')
    server.set_forkserver_preload([f'{name}.apis' for name in libraries if find_spec(name)])
    return server


def _run_script(root, arguments, environment, *streams):
    """What Python does with its arguments: ``SCRIPT ...`` or ``-m MODULE ...``."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)
    # As in the tests' own process: what was imported is no garbage.
    gc.freeze()
    os.chdir(root)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == '-m':
        sys.argv = arguments[1:]
        sys.path[0] = str(root)
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(os.path.abspath(arguments[0]), run_name='__main__')


def scalars(work_dir):
    lines = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines
