"""The dense model writes text for compensation: as much as is asked for, and only where it can."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import tiny_llama, tiny_t5

from nirvana import estimate
from nirvana.errors import InputError
from nirvana.estimate import Sizes, Workload
from nirvana.estimate_memory import self_generation_bytes
from nirvana.generation import generate
from nirvana.loading import load_model
from tasks.generate_text import run, written_by
from tasks.model_directory import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """The step fixes torch for its own process, which here goes on with other tests."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


def asked(method="least_squares", count=3, seed=0):
    return SimpleNamespace(
        compensation=SimpleNamespace(method=method, self_generated=count, sequence_length=9),
        calibration=SimpleNamespace(seed=seed),
        compute=SimpleNamespace(threads=1),
        runtime=SimpleNamespace(device="cpu"),
    )


def written(model, target, **changes):
    run(asked(**changes), {"model": model}, {"generated_ids": target})
    return load_file(target)["input_ids"]


def test_the_model_writes_as_much_as_is_asked_for(model, tmp_path):
    ids = written(model, tmp_path / "ids.safetensors")
    assert ids.shape == (3, 9) and ids.dtype == np.int64
    # the tokenizer's tokens without BOS and EOS; the model has embeddings of more
    tokens = range(2, len(load_tokenizer(model)))
    assert tokens.stop < 512
    assert torch.equal(torch.from_numpy(ids), generate(load_model(model), 3, 9, tokens))
    first = (tmp_path / "ids.safetensors").read_bytes()
    written(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first
    assert (written(model, tmp_path / "other.safetensors", seed=1) != ids).any()


@pytest.mark.parametrize("changes", [{"method": "none"}, {"count": 0}])
def test_nothing_to_write_is_an_empty_tensor(changes, tmp_path):
    # the model is not even looked at
    ids = written(tmp_path / "nowhere", tmp_path / "ids.safetensors", **changes)
    assert ids.shape == (0, 9) and ids.dtype == np.int64


def test_an_encoder_decoder_writes_none(tmp_path):
    ids = written(tiny_t5(tmp_path / "model"), tmp_path / "ids.safetensors")
    assert ids.shape == (0, 9) and ids.dtype == np.int64


def test_a_step_with_nothing_to_do_is_soon_done(tmp_path):
    """It runs in every pipeline, and torch takes seconds to import."""
    script = (
        "import json, sys; from pathlib import Path; from types import SimpleNamespace as N;"
        "from tasks.generate_text import run;"
        "run(N(compensation=N(method='none', self_generated=3, sequence_length=9)), {}, "
        "{'generated_ids': Path(sys.argv[1])});"
        "print(json.dumps([name in sys.modules for name in ('torch', 'transformers')]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "ids.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False]
    assert load_file(tmp_path / "ids.safetensors")["input_ids"].shape == (0, 9)


def test_tokens_that_the_model_does_not_know_are_not_written(tmp_path):
    """A tokenizer may have more of them than the model has embeddings."""
    ids = written(tiny_llama(tmp_path / "model", vocab_size=100), tmp_path / "ids.safetensors", count=20)
    assert ids.min() > 1 and 90 < ids.max() < 100


def test_a_model_that_does_not_fit_is_one_clear_line(model, monkeypatch):
    needed = self_generation_bytes(Sizes.of(model), Workload(self_generated=3, compensation_length=9), on_cpu=False)
    # float32 files are mapped, but have to stay in memory
    assert Sizes.of(model).stored_bytes == 4
    monkeypatch.setattr(estimate, "device_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match=r"compensation.self_generated: expected 0 .* need 0.5 GB, .*; set it to 0"):
        written_by(model, 3, 9, 0, CPU)
    monkeypatch.setattr(estimate, "device_bytes", lambda device: needed)
    assert written_by(model, 3, 9, 0, CPU).shape == (3, 9)
