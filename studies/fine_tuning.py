"""Does a pruned model still learn? Every method's, fine-tuned alike: same adapters, same tokens in the same order.

The dense model is trained as well: what it gains is the text's, and not what a pruned one gets back.

Each model is written as a checkpoint, low-rank adapters are trained on the text's own likelihood (nothing is distilled:
the dense model would teach what methods differ in), merged, and judged window by window as before.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from nirvana.adapter import merge
from nirvana.device import resolve_device
from nirvana.errors import InputError
from nirvana.files import scratch_directory
from nirvana.recovery import Recipe, recover
from nirvana.walk import Stack, final_hidden_states
from nirvana.weights import model_digest
from studies.comparison import Comparison, Row, Text, window_losses
from studies.lines import Line, Rows
from studies.measure import check, variants_of
from studies.spec import Spec
from studies.store import STUDIES, cached, study_key
from studies.subject import Subject
from studies.variants import DENSE, Variant, called
from tasks.corpus.documents import read_documents
from tasks.params import load_params
from tasks.recovery.recovery_text import training_text
from tasks.sample_pool import Encoder, split_documents
from tasks.workers.child import fix_torch

if TYPE_CHECKING:
    from tasks.params import Params, Recovery

STUDY = "fine_tuning"
_POINTS = 8
"""How many a learning curve has at most, after its first; a killed run repeats no more than what lies between two."""


def rows(subject: Subject, spec: Spec, values: Mapping[str, Any]) -> list[Row]:
    """Return the dense model's row, then one a model that was trained; finished ones are not trained again.

    Raises:
        InputError: If a method is unknown or has no checkpoint, none prunes, a ratio cannot be reached, peft is
            missing, or a loss is not finite.
    """
    variants, params = variants_of(spec, values), load_params()
    if all(variant.method == DENSE for variant, _ in variants):
        raise InputError("--methods: expected a method that prunes, got none; name one, such as nirvana")
    recipe = recipe_of(params.recovery, values["training_tokens"])
    check(subject.comparison, variants)
    fix_torch(subject.asked.threads or params.compute.threads)
    training = read_training(params, subject.files["model"], subject.corpus, recipe)
    tuning = Tuning(subject.comparison, training, recipe, resolve_device(params.runtime.device))
    subject.parameters |= tuning.described()
    if subject.asked.ids or subject.asked.corpus:
        subject.notes.append(f"trained on {subject.corpus}, pruned and judged on other text: a gain has to carry over")
    dense = subject.comparison.dense()
    found = [dense | {"before": dense["losses"], "trained": False}]
    with tqdm(variants, desc="fine-tuning", unit="model") as bar:
        for variant, _ in bar:
            bar.set_postfix_str(called(variant.method, variant.compensation))
            found.append(tuning.tuned(variant))
    return found


def recipe_of(recovery: "Recovery", tokens: int) -> Recipe:
    """Return how every model is trained: section `recovery` of params.yaml, nothing distilled, so many tokens.

    Raises:
        InputError: If the tokens make no step.
    """
    values = asdict(recovery) | {"tokens": tokens, "distillation": 0.0}
    del values["merge"]
    recipe = Recipe(**values)
    if recipe.steps < 1:
        raise InputError(
            f"--training-tokens: expected {recipe.tokens_a_step} or more, one batch of recovery.batch sequences of "
            f"recovery.sequence_length tokens, got {tokens}; ask for more"
        )
    every = math.ceil(recipe.steps / _POINTS) * recipe.tokens_a_step
    return Recipe(**values | {"curve_every": every})


def read_training(params: "Params", model: Path, corpus: Path, recipe: Recipe) -> Text:
    """Return what every model is trained on: the calibration split of a corpus, as the recover step cuts it.

    Args:
        params: Reads `calibration.add_bos`.
        model: The dense model, whose tokenizer reads documents.
        corpus: Directory of `documents.jsonl`.
        recipe: How much, how long and in which order.

    Raises:
        InputError: If there is no such corpus, or it does not fill one sequence.
    """
    documents = split_documents(read_documents(corpus / "documents.jsonl"))["calibration"]
    encoder = Encoder.of_model(model, params.calibration.add_bos)
    length, seed = recipe.sequence_length, recipe.seed
    (ids,) = training_text(documents, encoder, None, tokens=recipe.tokens, length=length, seed=seed)
    return Text(ids)


@dataclass(frozen=True)
class Tuning:
    """One dense model, the texts that it is pruned and judged by, and how and on what pruned models are trained."""

    comparison: Comparison
    training: Text
    recipe: Recipe
    device: torch.device

    def described(self) -> dict[str, Any]:
        """Return recipe and training text as MLflow keeps them."""
        training = {"text": self.training.digest, "sequences_and_tokens": list(self.training.ids.shape)}
        return {"recipe": asdict(self.recipe), "training": training, "device": self.device.type}

    def tuned(self, variant: Variant) -> Row:
        """Return what training makes of a variant, computed now unless it is known.

        Returns:
            Names of what was asked for; `achieved_ratio`; `adapter_parameters`; `curve`, the fields of
            `nirvana.recovery.CurvePoint` at each point, on the held-out text; `dense_heldout_loss` there; `before`
            and `after`, one mean loss a window of the evaluation text; `seconds_a_step`, the median.
        """
        variant.check(self.comparison)
        texts = {each: getattr(self.comparison.texts, each).digest for each in ("heldout", "evaluation")}
        key = {"study": STUDY, "kind": "fine-tuned", "model": self.comparison.model, "texts": texts}
        key |= {"variant": self.comparison.key(variant), "recipe": asdict(self.recipe)}
        key |= {"training": self.training.digest, "device": self.device.type}
        states = STUDIES / STUDY / f"{study_key(key, self._tuned)}.states"
        row = cached(key, lambda: self._tuned(variant, states))
        shutil.rmtree(states, ignore_errors=True)
        names = {name: getattr(variant, name) for name in ("method", "ratio", "compensation")}
        return names | row | {"trained": True, "tokens": row["curve"][-1]["tokens"]}

    def _tuned(self, variant: Variant, states: Path) -> Row:
        dense = self.comparison.model_directory
        STUDIES.mkdir(parents=True, exist_ok=True)
        with scratch_directory(STUDIES / STUDY) as directory:
            merged = directory / "merged"
            checkpoint, achieved = variant.kind.written(self.comparison, variant, directory)
            before = self._losses(checkpoint)
            # the same bytes only from the same checkpoint with as many threads
            state = {"pruned": model_digest(checkpoint), "threads": torch.get_num_threads()}
            file = states / f"{study_key(state, self._tuned)}.safetensors"
            tokens = self.recipe.steps * self.recipe.tokens_a_step
            heldout = self.comparison.texts.heldout.ids
            with _watched(f"training {variant.method}", tokens) as (times, on_step):
                found = recover(dense, checkpoint, self.training.ids, heldout, self.recipe, self.device, file, on_step)
            merged.mkdir()
            merge(checkpoint, found.adapter, merged)
            after = self._losses(merged)
        return {
            "achieved_ratio": achieved,
            "adapter_parameters": found.adapter.parameters,
            "curve": [asdict(point) for point in found.curve],
            "dense_heldout_loss": found.dense_loss,
            "before": before,
            "after": after,
            "seconds_a_step": float(np.median(np.diff(times))) if len(times) > 1 else 0.0,
        }

    def _losses(self, checkpoint: Path) -> list[float]:
        """Return the mean loss of each window of the evaluation text."""
        stack, ids = Stack.open(checkpoint), self.comparison.texts.evaluation.ids
        losses = window_losses(stack, final_hidden_states(stack, ids), ids).tolist()
        if not np.isfinite(losses).all():
            raise InputError(
                "fine_tuning: expected finite losses, got NaN or infinity; lower recovery.learning_rate or the ratio"
            )
        return losses


@contextmanager
def _watched(what: str, tokens: int) -> Iterator[tuple[list[float], Callable[[int], None]]]:
    """Show a bar of tokens; yield when each step ended, and what to call then."""
    times: list[float] = []
    with tqdm(total=tokens, desc=what, unit="token", leave=False) as bar:

        def on_step(done: int) -> None:
            times.append(time.monotonic())
            bar.update(done - bar.n)

        yield times, on_step


# --- what came out --------------------------------------------------------------------------------------------


def name_dense(lines: Sequence[Line], _rows: Rows, _values: Mapping[str, Any]) -> Sequence[Line]:
    """Tell the dense model that was trained from the one that was not."""
    for line in lines:
        if line["method"] == DENSE and line["trained"]:
            line["called"] = f"fine-tuned {DENSE}"
    return lines


def curves(rows: Rows, _values: Mapping[str, Any]) -> list[Line]:
    """Return a line a point of a learning curve: losses on the held-out text by tokens trained on."""
    found: list[Line] = []
    for row in rows[1:]:
        is_dense = row["method"] == DENSE
        name = f"fine-tuned {DENSE}" if is_dense else called(row["method"], row["compensation"])
        method = name if is_dense else row["method"]
        found += [{"method": method, "model": name, **point} for point in row["curve"]]
    dense = {"method": DENSE, "model": DENSE, "tokens": 0, "heldout_loss": rows[-1]["dense_heldout_loss"]}
    return [*found, dense]


def learned(tables: Mapping[str, Sequence[Line]], _rows: Rows, _values: Mapping[str, Any]) -> list[str]:
    """Say how many models learn, and which most and least."""
    trained = [line for line in tables[""] if line["trained"]]
    pruned = sorted((line for line in trained if line["method"] != DENSE), key=lambda line: -line["gain"])
    learners = [line for line in pruned if line["gain_low"] > 0]
    tokens = trained[0]["tokens"]
    said = f"{len(learners)} of {len(pruned)} pruned models learn significantly (95 %) in {tokens:,} tokens"
    if len(pruned) > 1:
        said += "; {0[called]} gains most ({0[gain]:+.3f} nats a token), {1[called]} least ({1[gain]:+.3f})".format(
            pruned[0], pruned[-1]
        )
    said += "".join(
        f"; the dense model {line['gain']:+.3f} by the same training" for line in trained if line["method"] == DENSE
    )
    return [f"{said}.", "Intervals are over windows, of one training run each."]
