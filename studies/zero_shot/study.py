"""How much zero-shot accuracy does each method lose?

Every model, dense or pruned, answers the same items by walking over the dense model's layers: no checkpoint is
written, no lm-eval started. `studies.zero_shot.scoring` answers as lm-eval does.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from nirvana.allocation import Keep, achieved_ratio
from nirvana.compensation import RIDGE
from nirvana.errors import InputError
from nirvana.walk import Hidden, TokenIds, final_hidden_states
from studies.comparison import BEST, COMPENSATIONS, DENSE, ROUND_TO, Comparison, Compensation, Row, Texts
from studies.methods import SHORTGPT, method_named
from studies.store import cached
from studies.zero_shot.items import Items, ItemSet, blocks
from studies.zero_shot.scoring import score_items
from tasks.sources.model_directory import load_tokenizer

STUDY = "zero_shot"
BLOCK = 100
"""Items that are remembered together: what a killed run loses, and what more items cost is theirs alone."""
Model = tuple[str, float, Compensation]
"""Method, ratio, compensation."""


@dataclass(frozen=True)
class Settings:
    """Which models answer."""

    ways: tuple[tuple[str, Compensation], ...] = (
        ("nirvana", "none"),
        ("nirvana", "least_squares"),
        ("fisher", "none"),
        BEST,  # type: ignore[assignment]
        ("llm_pruner", "none"),
        ("llm_pruner", "least_squares"),
        ("flap", "bias"),
    )
    """Method and compensation."""
    ratios: tuple[float, ...] = (0.2, 0.4)

    def models(self) -> Iterator[Model]:
        """Yield the dense model, then every pruned one."""
        yield DENSE, 0.0, "none"
        yield from ((name, ratio, compensation) for ratio in self.ratios for name, compensation in self.ways)


def measure(study: "ZeroShot", sets: Sequence[ItemSet], settings: Settings) -> list[Row]:
    """Return a row a model and set of items, the dense model's first; what an earlier run answered is not asked again.

    Returns:
        Names of what was asked for; `achieved_ratio`; `answers`, 1 or 0 an item; `documents` that the items are from;
        `seconds` of the run that asked.

    Raises:
        InputError: If a method or compensation is unknown, or a ratio cannot be reached.
    """
    for name, compensation in settings.ways:
        if name == SHORTGPT:
            raise InputError(f"expected methods that remove units, got {SHORTGPT}, which removes layers; leave it out")
        method_named(name)
        if compensation not in COMPENSATIONS:
            raise InputError(f"expected a compensation of {', '.join(COMPENSATIONS)}, got {compensation}; correct it")
    models, rows = list(settings.models()), []
    with tqdm(total=len(models) * sum(len(each.items) for each in sets), desc="asking", unit="item") as bar:
        for model in models:
            bar.set_postfix_str(f"{model[0]} {model[1]:g} {model[2]}")
            for each in sets:
                rows.append(study.asked(model, each, bar))
    return rows


class ZeroShot(Comparison):
    """One dense model, the texts that it is pruned by, and the items that judge it."""

    def __init__(self, model_directory: Path | str, texts: Texts, ridge: float = RIDGE, round_to: int = ROUND_TO):
        super().__init__(model_directory, texts, ridge, round_to)
        self._made: tuple[Model, Keep, dict[str, Tensor]] | None = None
        self._known: dict[str, list[str]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.model_directory)

    def asked(self, model: Model, of: ItemSet, bar: Any = None) -> Row:
        """Return one model's answers to a set of items, a block at a time; see `measure`."""
        parts = []
        for block, digest in zip(blocks(of.items, BLOCK), self._digests(of), strict=True):
            parts.append(self._block(model, block, digest))
            if bar is not None:
                bar.update(len(block))
        return {
            "text": of.text,
            "kind": of.kind,
            "method": model[0],
            "ratio": model[1],
            "compensation": model[2],
            "achieved_ratio": parts[0]["achieved_ratio"],
            "answers": [answer for part in parts for answer in part["answers"]],
            "documents": [item["document"] for item in of.items],
            "seconds": sum(part["seconds"] for part in parts),
        }

    def _digests(self, of: ItemSet) -> list[str]:
        """Digest each block and what the model reads of it: no digest of the model covers its tokenizer."""
        if of.digest not in self._known:
            read = (
                [[_asked(item), *map(self.tokenizer.encode, _texts(item))] for item in each]
                for each in blocks(of.items, BLOCK)
            )
            self._known[of.digest] = [
                hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest() for each in read
            ]
        return self._known[of.digest]

    def _block(self, model: Model, items: Items, digest: str) -> dict[str, Any]:
        name, ratio, compensation = model
        method = {} if name == DENSE else asdict(method_named(name)) | {"round_to": self.round_to}
        how = {key: value for key, value in method.items() if key not in ("scorer", "source")}
        key = self.key(name, ratio, compensation, 0, how)
        # the other two are not read here
        texts = {each: text for each, text in key["texts"].items() if each in ("calibration", "compensation")}
        key |= {"study": STUDY, "kind": "answers", "texts": texts, "items": digest}
        return cached(key, lambda: self._answer(model, items))

    def _answer(self, model: Model, items: Items) -> dict[str, Any]:
        keep, updates = self._pruned(model)
        stack, start = self.stack, time.monotonic()

        def hidden_of(ids: TokenIds) -> Hidden:
            return final_hidden_states(stack, ids, keep, updates) if keep else final_hidden_states(stack, ids)

        answers = score_items(
            hidden_of, stack.head_weight(), items, self.tokenizer, stack.architecture.logit_softcap
        ).astype(int)
        achieved = (
            achieved_ratio(stack.architecture.sites(), {site: len(kept) for site, kept in keep.items()}) if keep else {}
        )
        return {
            "answers": answers.tolist(),
            "achieved_ratio": achieved.get("total", 0.0),
            "seconds": time.monotonic() - start,
        }

    def _pruned(self, model: Model) -> tuple[Keep, dict[str, Tensor]]:
        """Return kept units and what makes up for the others; the last model's are kept, for its other blocks."""
        if self._made is None or self._made[0] != model:
            name, ratio, compensation = model
            keep: Keep = {} if name == DENSE else self.keep(name, ratio)[0]
            self._made = model, keep, self.updates(keep, compensation)
        return self._made[1], self._made[2]


def _asked(item: Any) -> dict[str, Any]:
    """Return what the model is asked: not where it is from."""
    return {name: value for name, value in item.items() if name != "document"}


def _texts(item: Any) -> list[str]:
    context, continuations = item["context"], item["choices"] if "choices" in item else [item["target"]]
    return [context, *(context + each for each in continuations)]
