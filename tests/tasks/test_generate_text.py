"""The dense model writes text for compensation: as much as is asked for, and only where it can."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny import tiny_llama, tiny_t5
from tokenizers import AddedToken

from nirvana import device as machine
from nirvana.errors import InputError
from nirvana.estimate.memory import self_generation_bytes
from nirvana.estimate.steps import ModelSizes, Workload
from nirvana.generation import generate
from nirvana.loading import load_model
from tasks.generate_text import interleaved, run, writable_tokens, written_by
from tasks.sample_pool import documents_of, save_ids
from tasks.sources.model_directory import load_tokenizer

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


def asked(method="least_squares", count=3, seed=0, add_bos=False):
    return SimpleNamespace(
        compensation=SimpleNamespace(method=method, self_generated=count),
        calibration=SimpleNamespace(seed=seed, add_bos=add_bos),
        compute=SimpleNamespace(threads=1),
        runtime=SimpleNamespace(device="cpu"),
    )


def mixed(model, target, **changes):
    """Run the step on five sequences of the corpus, rows of one number each; return where its output is."""
    corpus = target.with_suffix(".corpus")
    save_ids({"input_ids": np.full((5, 9), -1) * np.arange(1, 6)[:, None]}, [["a", "b"]], corpus)
    run(asked(**changes), {"model": model, "compensation_corpus": corpus}, {"compensation_ids": target})
    return target


def written(model, target, **changes):
    """Return what the model wrote of it."""
    ids = load_file(mixed(model, target, **changes))["input_ids"]
    return ids[ids[:, 0] >= 0]


def test_the_model_writes_as_much_as_is_asked_for(model, tmp_path):
    ids = written(model, tmp_path / "ids.safetensors")
    assert ids.shape == (3, 9) and ids.dtype == np.int64
    # the tokenizer's tokens without BOS and EOS; the model has embeddings of more
    tokens = range(2, len(load_tokenizer(model)))
    assert tokens.stop < 512
    assert torch.equal(torch.from_numpy(ids), generate(load_model(model), 3, 9, tokens))
    # five of the corpus at 1/10, 3/10, 5/10, 7/10, 9/10; three of the model at 1/6, 3/6, 5/6
    both = load_file(tmp_path / "ids.safetensors")["input_ids"]
    assert both[[0, 2, 3, 5, 7], 0].tolist() == [-1, -2, -3, -4, -5] and (both[[1, 4, 6]] == ids).all()
    assert documents_of(tmp_path / "ids.safetensors") == [["a", "b"]]
    first = (tmp_path / "ids.safetensors").read_bytes()
    written(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first
    assert (written(model, tmp_path / "other.safetensors", seed=1) != ids).any()


def test_sequences_begin_with_bos_where_the_corpus_has_it(model, tmp_path):
    ids = written(model, tmp_path / "ids.safetensors", add_bos=True)
    assert ids.shape == (3, 9)
    bos = load_tokenizer(model).bos_token_id
    assert (ids[:, 0] == bos).all() and (ids[:, 1:] != bos).all()


@pytest.mark.parametrize("changes", [{"method": "none"}, {"count": 0}])
def test_with_nothing_to_write_the_corpus_stays_as_it_is(changes, tmp_path):
    # the model is not even looked at
    target = mixed(tmp_path / "nowhere", tmp_path / "ids.safetensors", **changes)
    assert target.read_bytes() == target.with_suffix(".corpus").read_bytes()


def test_an_encoder_decoder_writes_none(tmp_path):
    model = tiny_t5(tmp_path / "model")
    target = mixed(model, tmp_path / "ids.safetensors")
    assert target.read_bytes() == target.with_suffix(".corpus").read_bytes()
    with pytest.raises(InputError, match="--self-generated: expected 0 for an encoder-decoder"):
        written_by(model, 3, 9, 0, False, CPU, "--self-generated")


def test_no_special_token_is_written_whether_the_tokenizer_names_it_or_not(tmp_path):
    """A separator of files or turns has no name of its own, as BOS has, but is flagged."""
    model = tiny_llama(tmp_path / "model", vocab_size=600)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([AddedToken("<file_sep>", special=True), AddedToken("naturally", special=False)])
    tokenizer.save_pretrained(model)
    separator, word = load_tokenizer(model).convert_tokens_to_ids(["<file_sep>", "naturally"])
    assert separator not in load_tokenizer(model).all_special_ids
    tokens = writable_tokens(model)
    assert word in tokens and separator not in tokens
    assert tokens == sorted({*range(2, separator), word})


@given(st.integers(0, 40), st.integers(0, 40))
def test_two_kinds_are_spread_evenly(first, second):
    rows = interleaved(torch.arange(first)[:, None], -1 - torch.arange(second)[:, None])[:, 0].numpy()
    assert rows[rows >= 0].tolist() == list(range(first))  # each kind in its own order
    assert (-1 - rows[rows < 0]).tolist() == list(range(second))
    # any beginning has its share of either kind, to within half a row
    shares = np.arange(1, len(rows) + 1) * first / max(1, first + second)
    assert (np.abs(np.cumsum(rows >= 0) - shares) <= 0.5 + 1e-9).all()


def test_a_step_with_nothing_to_do_is_soon_done(tmp_path):
    """It runs in every pipeline, and torch takes seconds to import."""
    script = (
        "import json, sys; from pathlib import Path; from types import SimpleNamespace as N;"
        "from tasks.generate_text import run;"
        "run(N(compensation=N(method='none', self_generated=3)), {'compensation_corpus': Path(sys.argv[1])}, "
        "{'compensation_ids': Path(sys.argv[2])});"
        "print(json.dumps([name in sys.modules for name in ('torch', 'transformers')]))"
    )
    (tmp_path / "corpus.safetensors").write_bytes(b"as it is")
    command = [sys.executable, "-c", script, *(str(tmp_path / f"{name}.safetensors") for name in ("corpus", "ids"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False]
    assert (tmp_path / "ids.safetensors").read_bytes() == b"as it is"


def test_tokens_that_the_model_does_not_know_are_not_written(tmp_path):
    """A tokenizer may have more of them than the model has embeddings."""
    ids = written(tiny_llama(tmp_path / "model", vocab_size=100), tmp_path / "ids.safetensors", count=20)
    assert ids.min() > 1 and 90 < ids.max() < 100


def test_a_model_that_does_not_fit_is_one_clear_line(model, monkeypatch):
    needed = self_generation_bytes(
        ModelSizes.of(model), Workload(self_generated=3, compensation_length=9), on_cpu=False
    )
    # float32 files are mapped, but have to stay in memory
    assert ModelSizes.of(model).stored_bytes == 4
    monkeypatch.setattr(machine, "available_bytes", lambda device: needed - 1)
    expected = r"compensation.self_generated: expected fewer sequences, or 0, .* need 0.5 GB, .* free on cpu; ask for"
    with pytest.raises(InputError, match=expected):
        written_by(model, 3, 9, 0, False, CPU)
    monkeypatch.setattr(machine, "available_bytes", lambda device: needed)
    assert written_by(model, 3, 9, 0, False, CPU).shape == (3, 9)


def test_what_goes_to_a_gpu_has_to_fit_into_this_machine_first(model, monkeypatch):
    free = {"cuda": 10**12, "cpu": 4 * ModelSizes.of(model).weights - 1}
    monkeypatch.setattr(machine, "available_bytes", lambda device: free[device.type])
    with pytest.raises(InputError, match="free on cpu; ask for fewer"):
        written_by(model, 3, 9, 0, False, torch.device("cuda"))
