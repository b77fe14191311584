"""What the recover step does when it is asked to: text of the calibration split in, checkpoint or adapter out.

The held-out batch, which chose the calibration set, is what the learning curve is measured on; text of the evaluation
split is never read. A killed step goes on from `.cache/recovery/<key>`; the key digests all that the result depends on.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from nirvana.adapter import merge
from nirvana.architectures.registry import read_config
from nirvana.checkpoint.digests import write_digests
from nirvana.checkpoint.recovered import Form, write_form
from nirvana.device import resolve_device
from nirvana.files import atomic_directory
from nirvana.recovery import Recipe, Recovered, recover
from nirvana.weights import model_digest
from tasks.corpus.documents import read_documents
from tasks.corpus.span_corruption import PairMaker
from tasks.corpus.token_files import read_ids
from tasks.provenance.environment_digest import code_digest, library_versions, machine
from tasks.recovery.recovery_text import training_text
from tasks.sample_pool import Encoder, split_documents
from tasks.workers.child import fix_torch

if TYPE_CHECKING:
    from tasks.params import Params

CACHE = Path(".cache/recovery")

_LOG = logging.getLogger(__name__)


def fine_tune(
    params: "Params", inputs: Mapping[str, Path], recovered: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Fine-tune the pruned checkpoint and write what becomes of it.

    Args:
        params: Reads `recovery`, `calibration.add_bos`, `compute` and `runtime`.
        inputs: As the recover step gets them.
        recovered: Directory that appears.

    Returns:
        The summary, the learning curve, and the file to remove once both are written.

    Raises:
        InputError: If peft is missing, the documents are too few, or the loss is not finite.
    """
    fix_torch(params.compute.threads)
    settings = asdict(params.recovery)
    form: Form = "merged" if settings.pop("merge") else "adapter"
    recipe = Recipe(**settings)
    device = resolve_device(params.runtime.device)
    text, heldout = _training_text(params, inputs), read_ids(inputs["heldout"])
    key = _key(
        dense=model_digest(inputs["model"]),
        pruned=model_digest(inputs["checkpoint"]),
        ids=[hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (*text, *heldout)],
        recipe=settings,
        threads=params.compute.threads,
        device=device.type,
    )
    state = CACHE / f"{key}.safetensors"
    with tqdm(total=recipe.steps * recipe.tokens_a_step, desc="recover", unit="token") as bar:

        def advance(tokens: int) -> None:
            bar.update(tokens - bar.n)

        found = recover(inputs["model"], inputs["checkpoint"], text, heldout, recipe, device, state, advance)
    with atomic_directory(recovered) as directory:
        if form == "merged":
            merge(inputs["checkpoint"], found.adapter, directory)
        else:
            found.adapter.save(directory)
        write_form(directory, form, **settings)
        if form == "merged":
            write_digests(directory)
    return _summary(form, recipe, found, len(text[0])), [asdict(point) for point in found.curve], state


def _training_text(params: "Params", inputs: Mapping[str, Path]) -> tuple[Tensor, ...]:
    asked = params.recovery
    documents = split_documents(read_documents(inputs["corpus"] / "documents.jsonl"))["calibration"]
    encoder = Encoder.of_model(inputs["model"], params.calibration.add_bos)
    config = read_config(inputs["model"])
    pairs = PairMaker.of_model(encoder.tokenizer, config) if config.is_encoder_decoder else None
    text = training_text(documents, encoder, pairs, tokens=asked.tokens, length=asked.sequence_length, seed=asked.seed)
    _LOG.info("%d sequences of %d tokens", len(text[0]), asked.sequence_length)
    return text


def _key(**depends_on: Any) -> str:
    stated = {"code": code_digest(), "libraries": library_versions(), "machine": machine(), **depends_on}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _summary(form: Form, recipe: Recipe, found: Recovered, sequences: int) -> dict[str, Any]:
    first, last = found.curve[0], found.curve[-1]
    summary: dict[str, Any] = {
        "form": form,
        "tokens": last.tokens,
        "steps": recipe.steps,
        "passes": recipe.steps * recipe.batch / sequences,
        "adapter_parameters": found.adapter.parameters,
        "heldout_loss": {"dense": found.dense_loss, "pruned": first.heldout_loss, "recovered": last.heldout_loss},
    }
    if last.heldout_kl is not None:
        summary["heldout_kl"] = {"pruned": first.heldout_kl, "recovered": last.heldout_kl}
    return summary
