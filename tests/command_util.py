"""Runs the project's scripts as a user would, and reads what they log."""

import json
import os
import subprocess
import sys


def run(root, *command, **environment):
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


def scalars(work_dir):
    lines = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines
