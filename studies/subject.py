"""What a study is about: a model, the texts that it is pruned and judged by, a corpus; from what the user asked for.

Nothing here imports torch before it is asked for something: the command line sets threads first.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nirvana.presets import PRESETS
from tasks.params import load_params

if TYPE_CHECKING:
    from studies.comparison import Comparison, Texts

TOKENS, QUICK_TOKENS = 4096, 2048
QUICK_COMPENSATION_SEQUENCES = 32
SELF_GENERATED, QUICK_SELF_GENERATED = PRESETS["best"]["compensation.self_generated"], 24
_FEWEST = 2
"""Evaluation tokens that are read and not used."""


@dataclass(frozen=True)
class Asked:
    """What the command line says besides a study's settings."""

    ids: Path | None = None
    judge: Path | None = None
    model: Path | None = None
    corpus: Path | None = None
    text: Path | None = None
    tokens: int = TOKENS
    compensation_sequences: int = QUICK_COMPENSATION_SEQUENCES  # of a study that fits nothing on them
    self_generated: int = 0
    threads: int | None = None
    processes: int = 2
    quick: bool = False

    def limited(self) -> "Asked":
        """Return what `--quick` makes of it: fewer tokens and sequences."""
        if not self.quick:
            return self
        return replace(
            self,
            tokens=min(self.tokens, QUICK_TOKENS),
            compensation_sequences=min(self.compensation_sequences, QUICK_COMPENSATION_SEQUENCES),
            self_generated=min(self.self_generated, QUICK_SELF_GENERATED),
        )


@dataclass(eq=False)
class Subject:
    """What a study reads; opened when it is first asked for."""

    asked: Asked
    files: dict[str, Path]
    """`model`, and `corpus` where the texts come from."""
    judges_tokens: bool = True
    """Whether the evaluation text judges anything."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What is recorded beside the settings."""
    notes: list[str] = field(default_factory=list)
    """Lines under the tables."""

    @property
    def corpus(self) -> Path:
        """A directory of documents.jsonl: the one given, or the pipeline's."""
        return self.asked.corpus or self.files["corpus"]

    @cached_property
    def texts(self) -> "Texts":
        """What every method calibrates on and is judged by."""
        from studies.texts import judged_on, texts_of_ids, texts_of_pipeline, with_generated

        asked, params = self.asked, None
        # what another text is judged by says nothing of how much this one has to hold
        sizes = (asked.tokens if self.judges_tokens and not asked.judge else _FEWEST, asked.compensation_sequences)
        if asked.ids:
            texts = texts_of_ids(asked.ids, *sizes)
        else:
            params = load_params()
            texts = texts_of_pipeline(params, self.files["model"], self.files["corpus"], *sizes)
        texts = with_generated(texts, self.files["model"], asked.self_generated, params)
        texts = judged_on(texts, asked.judge, self.files["model"], asked.tokens) if asked.judge else texts
        names = ("calibration", "compensation", "heldout", "evaluation")
        self.parameters["text"] = {name: getattr(texts, name).digest for name in names}
        self.parameters["sequences_and_tokens"] = {name: list(getattr(texts, name).ids.shape) for name in names}
        if asked.compensation_sequences or asked.self_generated:
            self.notes.append(fitted_on(texts, asked))
        return texts

    @cached_property
    def comparison(self) -> "Comparison":
        """The model and its texts."""
        from studies.comparison import Comparison

        return Comparison(self.files["model"], self.texts)


def fitted_on(texts: "Texts", asked: Asked) -> str:
    """Return a note of what compensation was fitted on."""
    sequences, length = texts.compensation.ids.shape
    own = f", {asked.self_generated} x {length} of them the dense model's own" if asked.self_generated else ""
    return f"compensation (LS: output projections by least squares) was fitted on {sequences} x {length} tokens{own}"
