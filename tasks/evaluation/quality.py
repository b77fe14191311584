"""What both evaluation steps share: token perplexity on held-out documents, and lm-eval's tasks by name."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nirvana.device import resolve_device
from nirvana.errors import InputError
from nirvana.files import scratch_directory, write_json
from nirvana.loading import load_config, load_model
from nirvana.walk import Stack
from tasks.corpus.documents import Document, read_documents
from tasks.corpus.span_corruption import SPANS
from tasks.estimates.way_of_computing import chosen_way
from tasks.evaluation.cloze import write_cloze_task
from tasks.evaluation.continuation import write_continuation_task
from tasks.evaluation.lm_eval_json import deterministic, headline_metrics
from tasks.evaluation.lm_eval_task import OFFLINE_TASKS
from tasks.evaluation.perplexity_text import perplexity_text
from tasks.evaluation.task_names import unknown_task
from tasks.sources.model_directory import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from tasks.params import Params

SCRATCH = Path(".cache/scratch")  # not the system's: what a killed step leaves there, nobody removes

_LOG = logging.getLogger(__name__)

# `paper` in evaluation.tasks: the eight of the paper's tables
PAPER = ("wikitext", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "boolq", "openbookqa")
_WRITERS = {"cloze": write_cloze_task, "continuation": write_continuation_task}
# lm-eval's own default for models that do not say; models that say 128k would fill memory with logits
_LONGEST_CONTEXT = 2048
# Standard errors of means are exact whatever this is, but 0 would leave them out; others are resampled.
_BOOTSTRAP_ITERATIONS = 100


def evaluate_checkpoint(
    params: "Params", checkpoint: Path, evaluation: Path, summary_file: Path, raw_file: Path
) -> None:
    """Evaluate one checkpoint and write the summary and lm-eval's own results.

    Args:
        params: Reads `evaluation` and `runtime`.
        checkpoint: Directory of a dense or pruned model with its tokenizer.
        evaluation: Directory with the held-out documents.
        summary_file: Receives token perplexity and one metric a task.
        raw_file: Receives lm-eval's results, less what changes from run to run.

    Raises:
        InputError: If a task is unknown, its data cannot be had, or the documents are too few.
    """
    asked = params.evaluation
    device = resolve_device(params.runtime.device)
    documents = read_documents(evaluation / "documents.jsonl")
    tokenizer = load_tokenizer(checkpoint)
    config = load_config(checkpoint)
    judged = perplexity_text(tokenizer, config, documents, asked.window, asked.perplexity_tokens)
    execution = chosen_way(params, checkpoint, [torch.empty(1, asked.window)], device).execution
    # where there are sentinels, a blank is what the model was trained to fill
    blank = "<extra_id_0>" if judged.kind == SPANS else None
    # everything that can be wrong with the input is found before the model is loaded
    with scratch_directory(SCRATCH / "evaluation") as scratch:
        folder = scratch.resolve()
        items = {"cloze": asked.cloze_items, "continuation": asked.continuation_items}
        tasks, manager = _load_tasks(expand(asked.tasks), documents, items, blank, folder)
        perplexity = judged.perplexity(Stack.open(checkpoint, device, execution))
        _LOG.info("token perplexity %.2f", perplexity)
        # without tasks, a model that does not fit into memory can be judged too
        raw: dict[str, Any] = {"results": {}, "config": {}, "samples": {}, "n-samples": {}}
        if tasks:
            model = load_model(checkpoint, device)
            raw = _run_lm_eval(model, tokenizer, tasks, manager, asked.batch_size, asked.limit)
        raw = deterministic(raw, str(folder))
    write_json(raw_file, raw)
    write_json(
        summary_file,
        {
            "token_perplexity": perplexity,
            "token_perplexity_tokens": judged.predictions,
            "token_perplexity_window": asked.window,
            "token_perplexity_kind": judged.kind,
            "bos": judged.bos,
            "tasks": headline_metrics(raw),
        },
    )


def expand(names: Sequence[str]) -> list[str]:
    """Return the task names without repetition, `paper` replaced by the paper's eight."""
    every = [each for name in names for each in (PAPER if name == "paper" else (name,))]
    return list(dict.fromkeys(every))


def _load_tasks(
    names: Sequence[str], documents: Sequence[Document], items: Mapping[str, int], blank: str | None, folder: Path
) -> tuple[list[Any], "TaskManager"]:
    """Return lm-eval's task and group objects, their data read, and the index that knows them.

    `OFFLINE_TASKS` are made here, of `items[name]` items, in a folder of their own, and read offline. The others may
    need the hub: whether that is allowed was decided before the hub's client was imported (see `online` in
    tasks/registry.py).
    """
    from lm_eval.tasks import TaskManager

    if not names:
        return [], TaskManager(include_defaults=False)
    others = [name for name in names if name not in OFFLINE_TASKS]
    for name in OFFLINE_TASKS:
        if name in names:
            _WRITERS[name](documents, items[name], folder, blank)
    if others:
        _LOG.info("reading the index of lm-eval's own tasks")
    manager = TaskManager(include_path=str(folder), include_defaults=bool(others))
    if unknown := [name for name in others if name not in manager.all_tasks]:
        raise InputError(unknown_task(unknown[0], manager.all_tasks))
    loaded: list[Any] = []
    for name in names:
        with _offline() if name in OFFLINE_TASKS else _hub_explained(name):
            loaded.extend(_top_level(manager.load([name])))
    return loaded, manager


def _top_level(loaded: Mapping[str, Any]) -> list[Any]:
    """Return what was asked for of what lm-eval loaded: a group stands for its members."""
    members = {member for group in loaded["group_map"].values() for member in group}
    every = [*loaded["groups"].items(), *loaded["tasks"].items()]
    return [each for name, each in every if name not in members]


@contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` off the network, also where it reads a local file: it would count the download."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _hub_explained(name: str) -> Iterator[None]:
    """Turn the many ways in which a task's data may fail to arrive into one line."""
    _LOG.info("reading the data of task %s", name)
    try:
        yield
    except Exception as error:  # connection, hub, offline mode, missing builder: no common class
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"evaluation.tasks: expected the data of {name} from the Hugging Face hub or its local cache, got {cause}; "
            "connect to the network (HF_HUB_OFFLINE unset) or leave the task out"
        ) from error


def _run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    manager: "TaskManager",
    batch_size: int,
    limit: int | None,
) -> dict[str, Any]:
    """Return lm-eval's results with one row a sample."""
    from lm_eval import simple_evaluate

    from tasks.evaluation.lm_eval_model import ContinuationLM

    context = getattr(model.config, "max_position_embeddings", None) or _LONGEST_CONTEXT
    # it tells its seeds, and warns that a loaded model is taken as it is: that is what we want
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    language_model = ContinuationLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="seq2seq" if model.config.is_encoder_decoder else "causal",  # it does not know the pruned ones' names
        batch_size=batch_size,
        device=str(model.device),
        max_length=min(context, _LONGEST_CONTEXT),
    )
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrap here rather than in forks of a process with threads
    return simple_evaluate(
        model=language_model,
        tasks=tasks,
        task_manager=manager,
        bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        limit=limit,
    )
