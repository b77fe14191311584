"""How much the calibration text decides: which batch, how many sequences, how long, of what kind.

Every plan comes about as in the pipeline: a batch's saliency, or the mean of several batches', is allocated at one
ratio, and the plan is judged by KL(dense‖pruned) on the held-out batch and by the loss on windows of the evaluation
text. The question behind it is whether the former, which the pipeline may look at, tells of the latter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file
from tqdm import tqdm

from nirvana.allocation import Keep
from nirvana.files import scratch_directory
from nirvana.methods.registry import method_named
from studies.bootstrap import Interval, paired_bootstrap, unpaired_bootstrap
from studies.comparison import Comparison, Row, Text, Texts
from studies.lines import Line, perplexity
from studies.methods import keep_of, scores_of
from studies.sources import CORPUS, Source, corpus_source, ids_source
from studies.spec import Spec
from studies.store import STUDIES
from studies.subject import Subject
from studies.variants import DENSE, Variant
from tasks.params import load_params
from tasks.unit_saliency import averaged_saliency

Rows = Sequence[Mapping[str, Any]]
Losses = NDArray[np.float64]
"""`[plans, windows]`"""
Values = Mapping[str, Any]
_TAILS = (2.5, 97.5)
_SAMPLES, _SEED = 10_000, 0
_COMPARED_AT_ONCE = 1 << 18  # two of 2 MB
ANY_ONE = "any one"
"""What a candidate taken blindly is called."""


def rows(subject: Subject, spec: Spec, values: Values) -> list[Row]:
    """Return a row a plan and text that judges it; see `plans`."""
    asked, params = subject.asked, load_params()
    corpus = corpus_source(params, subject.files["model"], subject.corpus, asked.tokens)
    other = ids_source(asked.ids, asked.tokens) if asked.ids else None
    texts = [each for each in (corpus, other) if each]
    subject.parameters["text"] = {
        each.name: {"heldout": each.heldout.digest, "evaluation": each.evaluation.digest} for each in texts
    }
    subject.parameters["evaluation_windows_and_tokens"] = list(corpus.evaluation.ids.shape)
    subject.parameters["pool_size"] = params.calibration.pool_size
    pool = {"pool_size": params.calibration.pool_size}
    return [row | pool for row in plans(Study(subject.files["model"], values), corpus, other, values)]


def plans(study: "Study", corpus: Source, other: Source | None, values: Values) -> list[Row]:
    """Return a row a plan and text that judges it; what an earlier run finished is not computed again.

    Returns:
        Of each, `part`: `dense`, `candidate`, `best` (averages of the best candidates), `any` (of any), `count` or
        `length`; `calibrated_on`, `judged_on`; `sequences`, `length`, `averaged` and `draw`; `kl_divergence`, `losses`.

    Raises:
        InputError: If the corpus has too little text for the candidates, the method is unknown or scores no units, or
            the ratio cannot be reached.
    """
    judges = [corpus] if other is None else [corpus, other]
    pool = corpus.batches(values["candidates"], values["sequences"], values["length"])
    candidates = [(corpus, pool)]
    if other is not None:
        candidates += [(other, other.as_many(values["other_candidates"], values["sequences"], values["length"]))]
    single = list(_batches(corpus, values))
    averages = sum(1 + len(_groups(len(pool), count, values["groups"])) for count in _averaged(values))
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
        for part, averaged, draw, keep in study.averages(pool, scores, values):
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


def _batches(corpus: Source, values: Values) -> Iterator[tuple[str, int, Text]]:
    """Yield part, draw and batch of every count and length: fewer draws, maybe none, where there is too little text."""
    shapes = [("count", count, values["length"]) for count in values["counts"]]
    shapes += [("length", max(1, values["length_tokens"] // length), length) for length in values["lengths"]]
    for part, sequences, length in shapes:
        for draw, text in enumerate(corpus.as_many(values["draws"], sequences, length)):
            yield part, draw, text


def _averaged(values: Values) -> list[int]:
    return [count for count in values["averaged"] if 1 < count <= values["candidates"]]


def _groups(candidates: int, count: int, at_most: int) -> list[list[int]]:
    """Cut candidates, in their order, into groups of `count` that share none."""
    groups = [list(range(first, first + count)) for first in range(0, candidates - count + 1, count)]
    return groups[:at_most] if count < candidates else []  # all of them are the best of them, too


class Study:
    """One dense model, one method and one ratio."""

    def __init__(self, model_directory: Path | str, values: Values):
        self.model_directory = Path(model_directory)
        self.variant = Variant(values["method"], values["ratio"])
        method_named(self.variant.method)
        self._judges: dict[str, Comparison] = {}

    def by(self, source: Source) -> Comparison:
        """Return the model with a source's texts, which judge it."""
        if source.name not in self._judges:
            texts = Texts(source.heldout, source.heldout, source.heldout, source.evaluation)
            self._judges[source.name] = Comparison(self.model_directory, texts)
        return self._judges[source.name]

    @property
    def _any(self) -> Comparison:
        return next(iter(self._judges.values()))

    def saliency(self, text: Text) -> dict[str, NDArray[np.float32]]:
        """Return a batch's unit saliency, computed once for all studies."""
        on = self._any
        method = method_named(self.variant.method)
        return scores_of(method, lambda: on.stack, on.model, text.ids, text.digest).saliency

    def keep(self, saliency: Mapping[str, NDArray[np.float32]]) -> Keep:
        """Return the plan of a saliency."""
        return keep_of(self.variant, self._any.sites, saliency, self._any.round_to)

    def averages(
        self, pool: Sequence[Text], scores: Sequence[float], values: Values
    ) -> Iterator[tuple[str, int, int, Keep]]:
        """Yield part, number, draw and plan of averages of the best and of any candidates, averaged as in the pipeline.

        Args:
            pool: The candidates.
            scores: Their KL.
            values: Which averages.
        """
        STUDIES.mkdir(parents=True, exist_ok=True)
        with scratch_directory(STUDIES / "calibration") as directory:
            files = [directory / f"candidate_{index:03d}.safetensors" for index in range(len(pool))]
            for file, text in zip(files, pool, strict=True):
                save_file(self.saliency(text), file)
            for count in _averaged(values):
                yield "best", count, 0, self.keep(averaged_saliency(files, scores, count))
                for draw, group in enumerate(_groups(len(pool), count, values["groups"])):
                    mean = averaged_saliency([files[index] for index in group], [0.0] * count, count)
                    yield "any", count, draw, self.keep(mean)

    def judged(self, keep: Keep | None, source: Source) -> Row:
        """Return what a plan (None: the dense model) costs on a source's texts, computed now unless it is known."""
        on = self.by(source)
        found = on.dense() if keep is None else on.judged_plan(keep)
        return {name: found[name] for name in ("kl_divergence", "losses")}


# --- rank correlation -------------------------------------------------------------------------------------------


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation; ties share their mean rank; NaN where one side is constant."""
    return float(_correlated(np.stack([np.asarray(each, dtype=np.float64) for each in (x, y)])))


def _correlated(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank correlation of each set of pairs, `[2, ..., pairs]`."""
    # a rank, but for a constant: how many are less, and half of those that are equal
    ranks = np.sign(pairs[..., :, None] - pairs[..., None, :]).sum(axis=-1) / 2
    with np.errstate(invalid="ignore"):  # 0 / 0
        result: NDArray[np.float64] = (ranks[0] * ranks[1]).sum(-1) / np.sqrt((ranks**2).sum(-1).prod(0))
    return result


def spearman_interval(x: ArrayLike, y: ArrayLike, samples: int = _SAMPLES, seed: int = _SEED) -> Interval:
    """Return the correlation and its 95 % percentile interval, pairs drawn with replacement.

    Rough where there are few pairs: of 16 it says little more than whether there is a correlation at all.
    """
    pairs = np.stack([np.asarray(each, dtype=np.float64) for each in (x, y)])
    count = pairs.shape[1]
    chosen = np.random.default_rng(seed).integers(count, size=(samples, count))
    at_once = max(1, _COMPARED_AT_ONCE // count**2)
    found = [_correlated(pairs[:, chosen[first : first + at_once]]) for first in range(0, samples, at_once)]
    low, high = np.nanpercentile(np.concatenate(found), _TAILS)
    return Interval(spearman(x, y), float(low), float(high))


# --- selection, averaging, amount ---------------------------------------------------------------------------------


def chance_of_selection(scores: ArrayLike, pool_size: int) -> NDArray[np.float64]:
    """Return how likely each candidate is to be selected out of a pool of `pool_size` of them, all pools alike likely.

    The candidate of rank r (from 0, by score) wins where it is drawn and no better one is: C(n−1−r, m−1) / C(n, m).
    """
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    chances = [math.comb(count - 1 - rank, pool_size - 1) / math.comb(count, pool_size) for rank in range(count)]
    result = np.empty(count)
    result[np.argsort(values, kind="stable")] = chances
    return result


def summary(rows: Rows, _values: Values) -> list[Line]:
    """Return what each way to choose is worth on the corpus.

    Of each, the mean over `plans`; `deviation` of the mean loss between them; `gain`, the loss of the mean candidate
    less this one's, nats a token, and its 95 % paired bootstrap interval over windows: of these plans on other text.
    """
    corpus, pool_size = CORPUS, rows[0]["pool_size"]
    pool = matching(rows, part="candidate", calibrated_on=corpus, judged_on=corpus)
    blind, scores = losses_of(pool).mean(axis=0), np.array([row["kl_divergence"] for row in pool])
    order = np.argsort(scores, kind="stable")
    by_loss = np.argsort([np.mean(row["losses"]) for row in pool], kind="stable")
    found = [_line("candidate", ANY_ONE, pool, blind)]
    if pool_size < len(pool):
        chances = chance_of_selection(scores, pool_size)
        found.append(_expected(f"lowest KL of {pool_size}, expected", pool, chances, blind))
    found.append(_line("candidate", f"lowest KL of {len(pool)}", [pool[order[0]]], blind))
    found.append(_line("candidate", "best in hindsight", [pool[by_loss[0]]], blind))
    for part, called in (("best", "mean of the best {}"), ("any", "mean of any {}")):
        for count in sorted({row["averaged"] for row in matching(rows, part=part)}):
            found.append(_line(part, called.format(count), matching(rows, part=part, averaged=count), blind))
    for part in ("count", "length"):
        for shape in dict.fromkeys((row["sequences"], row["length"]) for row in matching(rows, part=part)):
            members = matching(rows, part=part, sequences=shape[0], length=shape[1])
            found.append(_line(part, f"{shape[0]} × {shape[1]} tokens", members, blind))
    return found


def _line(part: str, variant: str, members: Rows, blind: Losses) -> Line:
    losses, interval = losses_of(members), paired_bootstrap(blind, losses_of(members).mean(axis=0))
    kl_divergence = float(np.mean([row["kl_divergence"] for row in members]))
    named = {"part": part, "variant": variant, "plans": len(members), "kl_divergence": kl_divergence}
    named |= {"token_perplexity": perplexity(losses), "deviation": _deviation(losses)}
    return named | dict(zip(("gain", "low", "high"), interval, strict=True))


def _expected(variant: str, pool: Rows, chances: NDArray[np.float64], blind: Losses) -> Line:
    losses = losses_of(pool)
    expected, each = chances @ losses, losses.mean(axis=1)
    kl_divergence = float(chances @ np.array([row["kl_divergence"] for row in pool]))
    named = {"part": "candidate", "variant": variant, "plans": len(pool), "kl_divergence": kl_divergence}
    named["token_perplexity"] = perplexity(expected)
    named["deviation"] = math.sqrt(float(chances @ (each - chances @ each) ** 2))
    return named | dict(zip(("gain", "low", "high"), paired_bootstrap(blind, expected), strict=True))


def matching(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def losses_of(rows: Rows) -> Losses:
    """Return each plan's loss on each window."""
    return np.array([row["losses"] for row in rows], dtype=np.float64)


def _deviation(losses: Losses) -> float | None:
    return float(losses.mean(axis=1).std(ddof=1)) if len(losses) > 1 else None


def correlations(rows: Rows, corpus: str) -> dict[str, Interval]:
    """Return how KL on the corpus ranks its candidates as perplexity does: on the corpus, and on what else judges."""
    pool = matching(rows, part="candidate", calibrated_on=corpus)
    scores = [row["kl_divergence"] for row in matching(pool, judged_on=corpus)]
    judges = dict.fromkeys(row["judged_on"] for row in pool)
    return {
        judge: spearman_interval(scores, losses_of(matching(pool, judged_on=judge)).mean(axis=1)) for judge in judges
    }


# --- domains ----------------------------------------------------------------------------------------------------


def domains(rows: Rows, _values: Values) -> list[Line]:
    """Return every pair of calibration text and judging text; none where there is one text only.

    `disadvantage` is the loss above that of plans calibrated on the judge's own kind of text, and its 95 % bootstrap
    interval, over batches of both and over windows; 0 where they are these.
    """
    judges = list(dict.fromkeys(row["judged_on"] for row in matching(rows, part="candidate")))
    found = []
    for judge in judges if len(judges) > 1 else []:
        dense = losses_of(matching(rows, part=DENSE, judged_on=judge))
        own = losses_of(matching(rows, part="candidate", calibrated_on=judge, judged_on=judge))
        for source in judges:
            members = matching(rows, part="candidate", calibrated_on=source, judged_on=judge)
            if not members or not len(own):
                continue
            losses = losses_of(members)
            interval = Interval(0.0, 0.0, 0.0) if source == judge else unpaired_bootstrap(losses, own)
            line = {"calibrated_on": source, "judged_on": judge, "plans": len(members)}
            line["kl_divergence"] = float(np.mean([row["kl_divergence"] for row in members]))
            line |= {"dense_perplexity": perplexity(dense), "token_perplexity": perplexity(losses)}
            line |= {"loss_increase": float(losses.mean() - dense.mean()), "deviation": _deviation(losses)}
            found.append(line | dict(zip(("disadvantage", "low", "high"), interval, strict=True)))
    return found


# --- what came out ----------------------------------------------------------------------------------------------


def told(rows: Rows, _values: Values) -> list[Line]:
    """Return a line a plan and judging text, numbered within its own `child`."""
    found: list[Line] = []
    numbers: dict[str, int] = {}
    for row in rows:
        child = f"{row['part']} {row['calibrated_on']} on {row['judged_on']}, {row['averaged']} of {row['sequences']}"
        numbers[child] = numbers.get(child, -1) + 1
        line = {name: value for name, value in row.items() if name != "losses"}
        line |= {"token_perplexity": perplexity(losses_of([row])), "child": child, "number": numbers[child]}
        found.append(line)
    return found


def verdict(tables: Mapping[str, Sequence[Line]], rows: Rows, _values: Values) -> list[str]:
    """Say whether KL ranks batches as perplexity does, and what choosing, averaging, more and other text is worth."""
    ranked = correlations(rows, CORPUS)
    candidates = len(matching(rows, part="candidate", calibrated_on=CORPUS, judged_on=CORPUS))
    spearman_of = "; on ".join(f"{judge} {_written(each, '.2f')}" for judge, each in ranked.items())
    said = [f"KL on the held-out batch ranks {candidates} batches as perplexity does, Spearman on {spearman_of}."]
    gains = [x for x in tables["summary"] if x["variant"] != ANY_ONE]
    for part in dict.fromkeys(line["part"] for line in gains):
        each = (f"{x['variant']} {_written(_of(x, 'gain'))}" for x in gains if x["part"] == part)
        said.append(f"Gain over a batch taken blindly, nats a token ({part}): {', '.join(each)}.")
    for line in tables["domains"]:
        if line["calibrated_on"] != line["judged_on"]:
            said.append(
                f"Judged on {line['judged_on']}, a batch of {line['calibrated_on']} loses "
                f"{_written(_of(line, 'disadvantage'))} nats a token against one of its own kind."
            )
    return said


def _of(line: Line, name: str) -> Interval:
    return Interval(line[name], line["low"], line["high"])


def _written(interval: Interval, how: str = "+.3f") -> str:
    return f"{interval.difference:{how}} [{interval.low:{how}}, {interval.high:{how}}]"
