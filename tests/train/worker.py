"""Trains one stage as a process of several: `worker.py STAGE CONFIG.json [--resume]`."""

import sys
from pathlib import Path

import torch
from diff2to3.train._config import load_config
from diff2to3.train._engine import train
from diff2to3.train.stages import build_stage

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = load_config(Path(sys.argv[2]))
    train(build_stage(sys.argv[1], config), config, "--resume" in sys.argv)
