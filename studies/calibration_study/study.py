"""How much the calibration text decides: which batch, how many sequences, how long, of what kind.

Every plan comes about as in the pipeline: a batch's saliency, or the mean of several batches', is allocated at one
ratio, and the plan is judged by KL(dense‖pruned) on the held-out batch and by the loss on windows of the evaluation
text. The question behind it is whether the former, which the pipeline may look at, tells of the latter.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tqdm import tqdm

from nirvana.allocation import Keep
from nirvana.architectures.registry import architecture_for, read_config
from nirvana.architectures.site import Site
from nirvana.errors import InputError
from nirvana.files import scratch_directory
from nirvana.head import head_divergence
from nirvana.ranges import to_ranges
from nirvana.walk import Hidden, Stack, final_hidden_states
from nirvana.weights import model_digest
from studies.calibration_study.texts import Source
from studies.comparison import DENSE, ROUND_TO, Text, window_losses
from studies.methods import SHORTGPT, allocate_for, method_named, scores_of
from studies.store import STUDIES, cached
from tasks.unit_saliency import averaged_saliency

STUDY = "calibration"
Row = dict[str, Any]
Saliency = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Settings:
    """Which batches are drawn; lengths in tokens."""

    method: str = "nirvana"
    ratio: float = 0.4
    candidates: int = 16
    sequences: int = 8
    """Of a candidate."""
    length: int = 128
    averaged: tuple[int, ...] = (2, 4, 8, 16)
    """So many candidates' saliency is averaged: the best by KL, and any others for comparison."""
    groups: int = 4
    """At most so many averages of any candidates, for each number."""
    counts: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Sequences of `length`."""
    lengths: tuple[int, ...] = (64, 128, 256)
    length_tokens: int = 2048
    """Tokens of a batch of each of the `lengths`."""
    draws: int = 3
    """Batches of each count and each length, as far as the text allows."""
    other_candidates: int = 8
    """Of the other text, where there is one."""


def measure(study: "CalibrationStudy", corpus: Source, other: Source | None, settings: Settings) -> list[Row]:
    """Return a row a plan and text that judges it; what an earlier run finished is not computed again.

    Returns:
        Of each, `part`: `dense`, `candidate`, `best` (averages of the best candidates), `any` (of any), `count` or
        `length`; `calibrated_on`, `judged_on`; `sequences`, `length`, `averaged` and `draw`; and what
        `CalibrationStudy.judged` found.

    Raises:
        InputError: If the corpus has too little text for the candidates, the method is unknown or scores no units, or
            the ratio cannot be reached.
    """
    if settings.method == SHORTGPT:
        raise InputError(f"expected a method that scores units, got {SHORTGPT}, which scores layers; choose another")
    method_named(settings.method)
    judges = [corpus] if other is None else [corpus, other]
    pool = corpus.batches(settings.candidates, settings.sequences, settings.length)
    candidates = [(corpus, pool)]
    if other is not None:
        candidates += [(other, other.as_many(settings.other_candidates, settings.sequences, settings.length))]
    single = list(_batches(corpus, settings))
    averages = sum(1 + len(_groups(len(pool), count, settings.groups)) for count in _averaged(settings))
    total = len(judges) * (1 + sum(len(texts) for _, texts in candidates)) + averages + len(single)
    rows: list[Row] = []
    with tqdm(total=total, desc="calibrating", unit="plan") as bar:

        def add(found: Mapping[str, Any], **named: Any) -> None:
            rows.append({"averaged": 1, "draw": 0, "calibrated_on": corpus.name, **named, **found})
            bar.update()

        for judge in judges:
            add(study.judged(None, judge), part=DENSE, judged_on=judge.name, calibrated_on="", sequences=0, length=0)
        for source, texts in candidates:
            for draw, text in enumerate(texts):
                keep = study.keep(study.saliency(text))
                for judge in judges:
                    named = {"calibrated_on": source.name, "judged_on": judge.name, "draw": draw}
                    add(study.judged(keep, judge), part="candidate", **_shape(text), **named)
        scores = [row["kl_divergence"] for row in rows if _is_selected_from(row, corpus)]
        for part, averaged, draw, keep in study.averages(pool, scores, settings):
            found = study.judged(keep, corpus)
            add(found, part=part, **_shape(pool[0]), averaged=averaged, draw=draw, judged_on=corpus.name)
        for part, draw, text in single:
            found = study.judged(study.keep(study.saliency(text)), corpus)
            add(found, part=part, **_shape(text), draw=draw, judged_on=corpus.name)
    return rows


def _is_selected_from(row: Row, corpus: Source) -> bool:
    return bool(row["part"] == "candidate" and row["calibrated_on"] == row["judged_on"] == corpus.name)


def _shape(text: Text) -> dict[str, int]:
    sequences, length = text.ids.shape
    return {"sequences": sequences, "length": length}


def _batches(corpus: Source, settings: Settings) -> Iterator[tuple[str, int, Text]]:
    """Yield part, draw and batch of every count and length: fewer draws, maybe none, where there is too little text."""
    shapes = [("count", count, settings.length) for count in settings.counts]
    shapes += [("length", max(1, settings.length_tokens // length), length) for length in settings.lengths]
    for part, sequences, length in shapes:
        for draw, text in enumerate(corpus.as_many(settings.draws, sequences, length)):
            yield part, draw, text


def _averaged(settings: Settings) -> list[int]:
    return [count for count in settings.averaged if 1 < count <= settings.candidates]


def _groups(candidates: int, count: int, at_most: int) -> list[list[int]]:
    """Cut candidates, in their order, into groups of `count` that share none."""
    groups = [list(range(first, first + count)) for first in range(0, candidates - count + 1, count)]
    return groups[:at_most] if count < candidates else []  # all of them are the best of them, too


class CalibrationStudy:
    """One dense model, one method and one ratio."""

    def __init__(self, model_directory: Path | str, method: str, ratio: float, round_to: int = ROUND_TO):
        self.model_directory, self.method = Path(model_directory), method_named(method)
        self.ratio, self.round_to = ratio, round_to
        self.model = model_digest(self.model_directory)
        self._dense: dict[str, Hidden] = {}

    @cached_property
    def stack(self) -> Stack:
        """The dense model, opened when the first plan has to be computed."""
        stack = Stack.open(self.model_directory)
        if stack.architecture.is_encoder_decoder:
            raise InputError(
                f"expected a decoder-only model, got {stack.architecture.model_type}; the texts of this study are of "
                "one stream"
            )
        return stack

    @cached_property
    def _sites(self) -> tuple[Site, ...]:
        return architecture_for(read_config(self.model_directory)).sites()

    def saliency(self, text: Text) -> Saliency:
        """Return a batch's unit saliency, computed once for all studies."""
        return scores_of(self.method, lambda: self.stack, self.model, text.ids, text.digest).saliency

    def keep(self, saliency: Mapping[str, NDArray[np.float32]]) -> Keep:
        """Return the plan of a saliency."""
        return allocate_for(self.method, self._sites, saliency, self.ratio, self.round_to)

    def averages(
        self, pool: Sequence[Text], scores: Sequence[float], settings: Settings
    ) -> Iterator[tuple[str, int, int, Keep]]:
        """Yield part, number, draw and plan of averages of the best and of any candidates, averaged as in the pipeline.

        Args:
            pool: The candidates.
            scores: Their KL.
            settings: Which averages.
        """
        STUDIES.mkdir(parents=True, exist_ok=True)
        with scratch_directory(STUDIES / STUDY) as directory:
            files = [directory / f"candidate_{index:03d}.safetensors" for index in range(len(pool))]
            for file, text in zip(files, pool, strict=True):
                save_file(self.saliency(text), file)
            for count in _averaged(settings):
                yield "best", count, 0, self.keep(averaged_saliency(files, scores, count))
                for draw, group in enumerate(_groups(len(pool), count, settings.groups)):
                    mean = averaged_saliency([files[index] for index in group], [0.0] * count, count)
                    yield "any", count, draw, self.keep(mean)

    def judged(self, keep: Keep | None, source: Source) -> Row:
        """Return what a plan costs on a source's texts, computed now unless it is known.

        Args:
            keep: Kept units by site name; None: the dense model.
            source: Whose held-out batch and evaluation text.

        Returns:
            `kl_divergence`, nats a token; `losses`, one mean a window.
        """
        ranges = None if keep is None else {name: to_ranges(indices) for name, indices in keep.items()}
        key = {
            "study": STUDY,
            "model": self.model,
            "keep": hashlib.sha256(json.dumps(ranges, sort_keys=True).encode()).hexdigest(),
            "texts": {"heldout": source.heldout.digest, "evaluation": source.evaluation.digest},
        }
        return cached(key, lambda: self._judge(keep, source))

    def _judge(self, keep: Keep | None, source: Source) -> Row:
        stack, heldout, evaluation = self.stack, source.heldout, source.evaluation

        def hidden_of(text: Text) -> Hidden:
            return final_hidden_states(stack, text.ids, keep)

        if heldout.digest not in self._dense:
            self._dense[heldout.digest] = final_hidden_states(stack, heldout.ids)
        head, softcap = stack.head_weight(), stack.architecture.logit_softcap
        dense, pruned = (each.flatten(0, 1) for each in (self._dense[heldout.digest], hidden_of(heldout)))
        divergence = head_divergence(dense, pruned, head, softcap)
        losses = window_losses(hidden_of(evaluation), evaluation.ids, head, softcap).tolist()
        if not np.isfinite([divergence, *losses]).all():
            raise InputError("expected finite losses, got NaN or infinity; the model's activations overflow")
        return {"kl_divergence": divergence, "losses": losses}
