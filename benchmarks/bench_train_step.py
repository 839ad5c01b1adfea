"""Epochs of training by network and library. Run with ``pytest benchmarks``; `train_step.py` prints the table."""

from __future__ import annotations

import pytest
from train_step import CONTENDERS, NETWORKS, Task, check, installed


@pytest.mark.parametrize("contender", [name for name in CONTENDERS if installed(name) and name != "torch.compile"])
@pytest.mark.parametrize("network", NETWORKS)
def test_epoch(benchmark, network, contender):
    task = Task(network)
    check(task, contender)
    run = CONTENDERS[contender](task)
    run(1)
    benchmark.group = f"an epoch of {network}, {task.steps} steps of {task.batch} rows"
    benchmark.extra_info["flops"] = task.flops * task.steps
    benchmark(run, 1)
