"""Trains a stage in processes that are killed at random moments: `kills.py CONFIG.json KILLS SEED`.

Prints a JSON list with a line a process: seconds until it was killed (or null), the step it had resumed from, the last
one it had reported, and the last checkpoint afterwards. Processes are forks of this one, which has imported everything.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from diff2to3.train import stages
from diff2to3.train._config import load_config
from diff2to3.train._engine import train


def child(config):
    """The training process; never returns."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(stages.build_stage("structure-vae", config), config, resume=True)
    os._exit(0)


def last(folder):
    found = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(found, default=0)


def reported(log):
    return max((json.loads(line)["step"] for line in log.read_text().splitlines()), default=0) if log.exists() else 0


def main():
    importlib.import_module("diff2to3.train.stages.structure_vae")
    config, kills, rng = load_config(Path(sys.argv[1])), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    importlib.import_module("torch._dynamo")  # the first step of an optimizer would
    checkpoints, log, rows = config.out / "checkpoints", config.out / "log.jsonl", []
    while not (config.out / "model" / "config.json").exists():
        start = last(checkpoints)
        log.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            child(config)
        delay = None
        if len(rows) < kills:
            while not log.exists() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.005)  # it is still building
            delay = rng.uniform(0, 0.15)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        rows.append({"seconds": delay, "from": start, "reported": reported(log), "checkpoint": last(checkpoints)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
