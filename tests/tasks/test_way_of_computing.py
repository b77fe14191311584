"""How many workers `auto` comes to: one a core or GPU, where candidates, memory and the work at hand allow."""

import os
from dataclasses import replace

import pytest
import torch
from tiny import tiny_llama

from nirvana.estimate import steps as estimate
from nirvana.estimate.memory import fisher_bytes
from nirvana.estimate.steps import ModelSizes, Workload, choose
from tasks.estimates.way_of_computing import workers_of
from tasks.params import Runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AUTO = Runtime("auto", "auto", "auto", "processes", "auto", None)
WORK = Workload(needs="input_gradients", sequences=100_000)
"""Enough for the smallest model to keep several processes busy."""


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "model")


def has_memory(monkeypatch, size):
    monkeypatch.setattr(estimate, "available_bytes", lambda device: size)


def test_cores_and_candidates_bound_them(model, monkeypatch):
    has_memory(monkeypatch, 10**15)
    assert workers_of(AUTO, model, WORK, CPU) == WORK.pool_size
    assert workers_of(AUTO, model, replace(WORK, pool_size=100), CPU) == 8
    assert workers_of(AUTO, model, replace(WORK, pool_size=1, sequences=10**6), CPU) == 1


def test_memory_bounds_them(model, monkeypatch):
    peak = fisher_bytes(ModelSizes.of(model), WORK, "resident", True)
    has_memory(monkeypatch, 2.5 * peak / estimate.FITS)
    assert workers_of(AUTO, model, WORK, CPU) == 2
    # nobody computes in a slower way for the sake of company
    has_memory(monkeypatch, 1.5 * peak / estimate.FITS)
    assert workers_of(AUTO, model, WORK, CPU) == 1
    has_memory(monkeypatch, 1)
    assert workers_of(AUTO, model, WORK, CPU) == 1


def test_little_work_is_for_one(model, monkeypatch):
    has_memory(monkeypatch, 10**15)
    assert workers_of(AUTO, model, Workload(), CPU) == 1


def test_a_number_is_taken_as_it_is_given(model, monkeypatch):
    has_memory(monkeypatch, 1)
    assert workers_of(replace(AUTO, workers=3), model, WORK, CPU) == 3
    assert workers_of(replace(AUTO, workers=30), model, WORK, CPU) == WORK.pool_size


def test_workers_of_a_scheduler_share_no_memory_of_ours(model):
    elsewhere = replace(AUTO, runner="dask", scheduler="tcp://10.0.0.5:8786")
    assert workers_of(elsewhere, model, WORK, CPU) == 1


def test_one_a_gpu(model, monkeypatch):
    has_memory(monkeypatch, 10**15)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert workers_of(AUTO, model, WORK, GPU) == 4
    # each has a GPU's memory to itself
    peak = fisher_bytes(ModelSizes.of(model), WORK, "resident", False)
    has_memory(monkeypatch, 1.5 * peak / estimate.FITS)
    assert workers_of(AUTO, model, WORK, GPU) == 4
    four = replace(WORK, workers=4)
    assert choose(model, four, GPU, "auto", "auto")[0] == "resident"
    assert choose(model, replace(WORK, workers=5), GPU, "auto", "auto")[0] == "streamed"
    assert workers_of(AUTO, model, WORK, torch.device("cuda:2")) == 1
    assert workers_of(replace(AUTO, workers=2), model, WORK, GPU) == 2
