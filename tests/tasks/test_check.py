"""What cannot work is said before the first step that costs, and what can work is not refused."""

import copy
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML
from tiny import save_family, tiny_corpus, tiny_llama, tiny_t5, tiny_tokenizer

from nirvana.errors import InputError
from tasks import check as early
from tasks.checks.model import check_model, context_tokens, shortages
from tasks.checks.text import check_text
from tasks.corpus.documents import Document, read_documents, write_documents
from tasks.evaluation.cloze import count_cloze_items
from tasks.evaluation.task_names import check_task_names
from tasks.params import parse_params
from tasks.sample_pool import split_documents

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "calibration.pool_size": 3,
    "calibration.sequences": 2,
    "calibration.sequence_length": 24,
    "calibration.heldout_sequences": 2,
    "calibration.heldout_length": 24,
    "compensation.sequences": 4,
    "compensation.sequence_length": 24,
    "evaluation.window": 32,
    "evaluation.perplexity_tokens": 256,
    "evaluation.cloze_items": 5,
    "evaluation.continuation_items": 5,
    "benchmark.prompt_length": 8,
    "benchmark.decode_tokens": 2,
    "compute.threads": 1,
}


def values(**changes: object) -> dict:
    given = copy.deepcopy(YAML(typ="safe").load(ROOT / "params.yaml"))
    for key, value in {**SMALL, **changes}.items():
        section, _, name = key.replace("__", ".").partition(".")
        given[section][name] = value
    return given


def params(**changes: object):
    return parse_params(values(**changes))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind and a corpus."""
    path = tmp_path_factory.mktemp("check")
    tiny_llama(path / "llama")
    for name in ("qwen3_moe",):
        save_family(name, path / name)
        tiny_tokenizer().save_pretrained(path / name)
    tiny_t5(path / "t5")
    texts = sorted(tiny_corpus(path / "texts").iterdir())
    write_documents(path / "corpus/documents.jsonl", (Document(file.stem, file.read_text()) for file in texts))
    return path


def refused(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and "; " in line
    return line


def test_what_fits_is_not_refused(home: Path) -> None:
    for model in ("llama", "t5", "qwen3_moe"):
        check_model(params(), home / model)
        check_text(params(), home / model, home / "corpus")
    check_model(params(method__preset="best"), home / "llama")
    check_text(params(method__preset="best", recovery__tokens=1024), home / "llama", home / "corpus")


@pytest.mark.parametrize(
    ("key", "tokens", "preset", "said"),
    [
        ("evaluation.window", 513, "nirvana", "evaluation.window: expected at most 512 tokens"),
        ("calibration.sequence_length", 600, "nirvana", "calibration.sequence_length: expected at most 512"),
        ("calibration.heldout_length", 600, "nirvana", "calibration.heldout_length: expected at most 512"),
        ("compensation.sequence_length", 600, "best", "compensation.sequence_length: expected at most 512"),
        ("compensation.sequence_length", 600, "nirvana", None),
        ("benchmark.prompt_length", 600, "nirvana", "benchmark.prompt_length: expected at most 512"),
        (
            "benchmark.decode_tokens",
            505,
            "nirvana",
            "benchmark.decode_tokens: expected at most 504 after a prompt of",
        ),
        ("benchmark.decode_tokens", 504, "nirvana", None),
        ("evaluation.window", 512, "nirvana", None),
        ("recovery.sequence_length", 600, "nirvana", None),
    ],
)
def test_lengths_beyond_the_context_are_named(home: Path, key: str, tokens: int, preset: str, said: str | None) -> None:
    changed = params(**{key: tokens, "evaluation.perplexity_tokens": 4096, "method.preset": preset})
    if said is None:
        check_model(changed, home / "llama")
    else:
        assert refused(lambda: check_model(changed, home / "llama")).startswith(said)
    check_model(changed, home / "t5")  # relative positions have no end


def test_recovery_counts_when_it_is_asked_for(home: Path) -> None:
    changed = params(recovery__sequence_length=600, recovery__tokens=6000)
    assert refused(lambda: check_model(changed, home / "llama")).startswith(
        "recovery.sequence_length: expected at most 512"
    )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 100),
        ({"rope_type": "default", "rope_theta": 1e4}, 100),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
        ({"type": "dynamic", "factor": 2.0}, None),
        ({"rope_type": "yarn", "factor": 4.0}, 400),
        (
            {"full": {"rope_type": "linear", "factor": 8.0}, "sliding": {"rope_type": "default"}},
            800,
        ),
        ({"rope_type": "longrope", "short_factor": [1.0]}, 100),
    ],
)
def test_stretched_positions_reach_further(rope: dict | None, expected: int | None) -> None:
    assert context_tokens(SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)) == expected
    assert context_tokens(SimpleNamespace(max_position_embeddings=100, rope_scaling=rope)) == expected


def test_no_context_is_no_limit() -> None:
    for odd in (
        SimpleNamespace(),
        SimpleNamespace(max_position_embeddings=None),
        SimpleNamespace(max_position_embeddings=-1),
    ):
        assert context_tokens(odd) is None


def test_a_ratio_that_cannot_be_reached_says_which_can(home: Path) -> None:
    said = refused(lambda: check_model(params(allocation__pruning_ratio=0.99), home / "llama"))
    assert said.startswith("allocation.pruning_ratio: 0.99 cannot be reached") and "at most 0." in said
    said = refused(lambda: check_model(params(allocation__round_to=65), home / "llama"))
    assert said.startswith("allocation.round_to: expected 1 to 64")


def test_best_on_units_that_cannot_be_compensated_is_refused_with_the_keys(home: Path) -> None:
    said = refused(lambda: check_model(params(method__preset="best"), home / "qwen3_moe"))
    assert "saliency.method fisher and compensation.method least_squares" in said
    assert "set method.preset to nirvana" in said
    said = refused(lambda: check_model(params(compensation__method="least_squares"), home / "qwen3_moe"))
    assert "for compensation.method least_squares, got" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.cloze_items": 10**6}, "evaluation.cloze_items: expected 1000000 items"),
        (
            {"evaluation.tasks": ["continuation"], "evaluation.continuation_items": 10**6},
            "evaluation.continuation_items: expected 1000000 items",
        ),
        ({"evaluation.perplexity_tokens": 10**7}, "evaluation.perplexity_tokens: expected at most"),
        ({"calibration.pool_size": 5000}, "calibration.pool_size: expected 5000 x 2 sequences"),
        ({"calibration.heldout_sequences": 3000}, "one held-out batch: expected 1 x 3000 sequences"),
        ({"calibration.sequence_length": 510, "calibration.sequences": 300}, "calibration.pool_size: expected"),
        ({"evaluation.tasks": [], "evaluation.cloze_items": 10**6}, None),
    ],
)
def test_what_the_text_does_not_give_is_named(home: Path, changes: dict, said: str | None) -> None:
    if said is None:
        check_text(params(**changes), home / "llama", home / "corpus")
    else:
        line = refused(lambda: check_text(params(**changes), home / "llama", home / "corpus"))
        assert line.partition(":")[2].partition(",")[0].strip() and said.partition(":")[2].split()[0] in line, line


def test_a_language_that_gives_no_items_is_told(home: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    characters = [chr(0x4E00 + number) for number in range(900)]
    texts = ["。".join("".join(generator.choices(characters, k=8)) for _ in range(300)) for _ in range(60)]
    write_documents(tmp_path / "documents.jsonl", (Document(f"d{number}", text) for number, text in enumerate(texts)))
    changed = params(evaluation__cloze_items=10_000)
    assert "evaluation.cloze_items" in refused(lambda: check_text(changed, home / "llama", tmp_path))


def test_what_a_language_gives_is_counted_over_all_of_it(home: Path, tmp_path: Path) -> None:
    """In a larger text its most frequent words are no answers: four documents may give more than sixty do."""
    generator = random.Random(0)
    rare = ["".join(generator.choices("bdfghklmnprst", k=9)) for _ in range(4000)]

    def document(number: int) -> Document:
        sentences = []
        for _ in range(8):
            filler = " ".join(generator.choices(rare, k=22))
            sentences.append(f"Der {filler} ändert größere Grenzen.")
        return Document(f"d{number}", " ".join(sentences))

    documents = [document(number) for number in range(60)]
    write_documents(tmp_path / "documents.jsonl", documents)
    changed = params(evaluation__cloze_items=4)
    evaluation = split_documents(documents)["evaluation"]
    assert count_cloze_items(evaluation[:4]) >= 4 > count_cloze_items(evaluation)
    assert "evaluation.cloze_items" in refused(lambda: check_text(changed, home / "llama", tmp_path))


def test_no_document_to_evaluate_on_is_told(home: Path, tmp_path: Path) -> None:
    texts = [file.text for file in read_documents(home / "corpus/documents.jsonl")]
    documents = [Document(f"d{number}", text) for number, text in enumerate(texts)]
    kept = [part for name, split in split_documents(documents).items() if name != "evaluation" for part in split]
    write_documents(tmp_path / "documents.jsonl", kept)
    for tasks in (["cloze"], []):
        changed = params(evaluation__tasks=tasks)
        assert "to evaluate on" in refused(lambda changed=changed: check_text(changed, home / "llama", tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration.sequence_length": 200, "calibration.sequences": 1},
        {"calibration.heldout_length": 200},
        {"evaluation.window": 200},
        {"recovery.sequence_length": 200, "recovery.tokens": 4096},
    ],
)
def test_sentinels_that_do_not_suffice_are_told(tmp_path: Path, home: Path, changes: dict) -> None:
    tiny_t5(tmp_path / "t5", sentinels=8)
    check_text(params(), tmp_path / "t5", home / "corpus")
    assert "8 sentinel tokens" in refused(lambda: check_text(params(**changes), tmp_path / "t5", home / "corpus"))


def test_task_names_are_looked_up_without_the_index() -> None:
    start = time.process_time()
    check_task_names(["cloze", "continuation", "paper"])
    check_task_names(["hellaswag", "mmlu", "egymmlu", "mmlu_abstract_algebra", "wikitext"])
    assert "lm_eval" not in sys.modules or os.environ.get("PYTEST_XDIST_WORKER")
    assert time.process_time() - start < 8


@pytest.mark.slow
def test_an_unknown_task_suggests_the_nearest() -> None:
    line = refused(lambda: check_task_names(["cloze", "hellaswagg"]))
    assert line.startswith(
        "evaluation.tasks: expected cloze, continuation, paper or a task of lm-eval, got 'hellaswagg'"
    )
    assert "did you mean hellaswag" in line
    assert len(refused(lambda: check_task_names(["x" * 900]))) < 300


def test_a_machine_that_is_too_small_is_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(shortages(params(), home / "llama")) == []
    from nirvana import device

    monkeypatch.setattr(device, "total_bytes", lambda place: 10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    said = list(shortages(params(), home / "llama"))
    assert any(line.startswith("collect_gradients will need") for line in said)
    assert said[-1].endswith("0.0 GB are free on this disk")
    (line,) = shortages(params(runtime__device="cuda"), home / "llama")
    assert line.startswith("runtime.device: expected a machine with CUDA")


def checked(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.check"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=path, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_by_hand_before_and_after_fetching_and_nothing_twice(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = YAML(typ="safe")
    yaml.dump(values(), tmp_path / "params.yaml")
    done = checked(tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("warning: no model in data/model yet")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/model").symlink_to(home / "llama")
    (tmp_path / "data/corpus").symlink_to(home / "corpus")
    monkeypatch.chdir(tmp_path)
    assert not early.is_sound(params())
    done = checked(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing found that cannot work\n", "")
    (kept,) = (tmp_path / ".cache/checks").iterdir()
    start = time.monotonic()
    assert early.is_sound(params())
    assert time.monotonic() - start < 0.3
    assert not early.is_sound(params(evaluation__window=33))
    for damage in (b"\xff", b"[" * 100_000, b"{}", b""):
        kept.write_bytes(damage)
        assert not early.is_sound(params())
    kept.unlink()
    kept.mkdir()
    assert not early.is_sound(params())
    yaml.dump(values(**{"allocation.pruning_ratio": 0.98}), tmp_path / "params.yaml")
    done = checked(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: allocation.pruning_ratio: 0.98 cannot be reached")
    assert done.stderr.count("\n") == 1
    (tmp_path / "params.yaml").write_text("5: 1\n")
    assert checked(tmp_path).stderr == "error: params.yaml: expected keys that are text, got the key 5; correct it\n"
