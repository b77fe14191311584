"""How much zero-shot accuracy does each method lose, and ours as a share of what NIRVANA loses?

Every model, dense or pruned, answers the same items by walking over the dense model's layers: no checkpoint is
written, no lm-eval started. `studies.scoring` answers as lm-eval does.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from studies.bootstrap import Interval, paired_bootstrap, resampled_sums
from studies.comparison import BEST, Comparison, Row
from studies.items import Items, ItemSet, blocks, item_sets
from studies.lines import Line
from studies.measure import check, variants_of
from studies.scoring import score_items
from studies.spec import Spec
from studies.store import cached
from studies.subject import Subject
from studies.variants import DENSE, Variant, called
from studies.words import stands
from tasks.sources.model_directory import load_tokenizer

Rows = Sequence[Mapping[str, Any]]
BLOCK = 100
"""Items that are remembered together: what a killed run loses, and what more items cost is theirs alone."""
NIRVANA = ("nirvana", "none")
_LEAST_DOCUMENTS = 8
"""Of fewer, to draw whole documents says too little of what others would give."""
ALL = "all"
"""Both kinds of item together."""
ALL_TEXTS = "all texts"
"""Every text's items of both kinds together."""
UNDEFINED = "undefined"
HALF = 0.5
"""Of NIRVANA's loss, what ours aim to lose at most."""
_NORMAL = 1.959964  # of 95 %, two-sided


def rows(subject: Subject, spec: Spec, values: Mapping[str, Any]) -> list[Row]:
    """Return a row a variant and set of items; what an earlier run answered is not asked again.

    Returns:
        Names of what was asked for; `text` and `kind` of the items; `achieved_ratio`; `answers`, 1 or 0 an item;
        `documents` that the items are from; `seconds` of the run that asked.

    Raises:
        InputError: If a method or compensation is unknown, a ratio cannot be reached, or a text holds too few items.
    """
    comparison, variants = subject.comparison, variants_of(spec, values)
    check(comparison, variants)
    sets = item_sets(comparison.model_directory, comparison.texts, subject.corpus, values["items"], subject.asked.text)
    subject.parameters["item_sets"] = {f"{x.text} {x.kind}": f"{len(x.items)} {x.digest}" for x in sets}
    return answered(comparison, variants, sets)


def answered(
    comparison: Comparison, variants: Sequence[tuple[Variant, Mapping[str, Any]]], sets: Sequence[ItemSet]
) -> list[Row]:
    """Ask every variant for every set of items; see `rows`."""
    tokenizer = load_tokenizer(comparison.model_directory)
    asked = [(each, _digests(tokenizer, each)) for each in sets]
    found = []
    with tqdm(total=len(variants) * sum(len(each.items) for each in sets), desc="asking", unit="item") as bar:
        for variant, names in variants:
            bar.set_postfix_str(" ".join(str(value) for value in names.values()))
            key: dict[str, Any] = {"study": "zero_shot", "kind": "answers", "model": comparison.model}
            key["variant"] = comparison.key(variant)
            for of, digests in asked:
                parts = []
                for block, digest in zip(blocks(of.items, BLOCK), digests, strict=True):
                    parts.append(
                        cached(
                            key | {"items": digest},
                            lambda block=block, variant=variant: _answer(comparison, variant, block, tokenizer),  # type: ignore[misc]
                        )
                    )
                    bar.update(len(block))
                found.append(_row(variant, of, parts))
    return found


def _row(variant: Variant, of: ItemSet, parts: Sequence[Mapping[str, Any]]) -> Row:
    return {
        "text": of.text,
        "kind": of.kind,
        **{name: getattr(variant, name) for name in ("method", "ratio", "compensation")},
        "achieved_ratio": parts[0]["achieved_ratio"],
        "answers": [answer for part in parts for answer in part["answers"]],
        "documents": [item["document"] for item in of.items],
        "seconds": sum(part["seconds"] for part in parts),
    }


def _digests(tokenizer: Any, of: ItemSet) -> list[str]:
    """Digest each block and what the model reads of it: no digest of the model covers its tokenizer."""
    read = ([[_asked(item), *map(tokenizer.encode, _texts(item))] for item in each] for each in blocks(of.items, BLOCK))
    return [hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest() for each in read]


def _answer(comparison: Comparison, variant: Variant, items: Items, tokenizer: Any) -> dict[str, Any]:
    stack = comparison.stack
    with variant.kind.made(comparison, variant) as model:
        start = time.monotonic()
        head, softcap = stack.head_weight(), stack.architecture.logit_softcap
        answers = score_items(model.hidden_of, head, items, tokenizer, softcap).astype(int)
        achieved = model.size["achieved_ratio"]
    return {"answers": answers.tolist(), "achieved_ratio": achieved, "seconds": time.monotonic() - start}


def _asked(item: Any) -> dict[str, Any]:
    """Return what the model is asked: not where it is from."""
    return {name: value for name, value in item.items() if name != "document"}


def _texts(item: Any) -> list[str]:
    context, continuations = item["context"], item["choices"] if "choices" in item else [item["target"]]
    return [context, *(context + each for each in continuations)]


# --- accuracy lost ----------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """A ratio of two mean losses and its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_of_losses(
    dense: ArrayLike,
    ours: ArrayLike,
    theirs: ArrayLike,
    documents: Sequence[str],
    texts: Sequence[str] | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> Ratio | None:
    """Return mean(dense − ours) / mean(dense − theirs) and its 95 % percentile interval.

    Documents are drawn with replacement, an item's three answers together. A draw in which theirs lose nothing has no
    finite ratio; it counts as infinite, so that it can widen the interval only.

    Args:
        dense: 1 or 0 an item.
        ours: On the same items.
        theirs: On the same items.
        documents: What each item is from.
        texts: What each document is from: of each text, as many documents are drawn as it has. None: of one.
        samples: Resampled sets of as many documents.
        seed: Of the draw.

    Returns:
        None where the loss of theirs is not significantly above 0: its own 95 % interval reaches 0.
    """
    if paired_bootstrap(dense, theirs, groups=documents, strata=texts).low <= 0:
        return None
    both = np.asarray(dense, dtype=np.float64)[:, None] - np.stack([ours, theirs], axis=1)
    lost, theirs_lost, _ = resampled_sums(both, documents, samples, seed, texts).T
    ratios = np.full(samples, np.inf)
    np.divide(lost, theirs_lost, out=ratios, where=theirs_lost > 0)
    # no interpolation: it would make a number of an infinite neighbour
    low, high = np.percentile(ratios, (2.5, 97.5), method="inverted_cdf")
    value = both.mean(axis=0)
    return Ratio(float(value[0] / value[1]), float(low), float(high))


def accuracy_interval(answers: ArrayLike) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    values = np.asarray(answers, dtype=np.float64)
    count, share, square = len(values), float(values.mean()), _NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    reach = _NORMAL / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def lines(rows: Rows, _values: Mapping[str, Any]) -> list[Line]:
    """Return a line a model and kind of item, one of all items where a text has both kinds, and one of all texts.

    Returns:
        By text and kind; the dense model first, then by ratio, the most accurate first. Shares of items, not percent:
        `accuracy` with its 95 % interval (Wilson), as if items were independent; `lost`, the dense model's less this
        one's; `of_nirvana`, `lost` / NIRVANA's at the same ratio, `undefined` where that is not significantly above 0,
        maybe with an infinite end; `behind_best`, accuracy of `comparison.BEST` at the same ratio less this one's.
        Intervals of losses draw what `drawn` says: documents, or items of a text of fewer than eight documents.
    """
    of_text = [{**row, "texts": [row["text"]] * len(row["answers"])} for row in rows]
    every = [*of_text, *_together(of_text)]
    if len({row["text"] for row in rows}) > 1:
        every += _together([{**row, "text": ALL_TEXTS} for row in of_text])
    answers = {(row["text"], row["kind"], *_model(row)): row["answers"] for row in every}
    found = []
    for text, kind in dict.fromkeys((row["text"], row["kind"]) for row in every):
        mine = [row for row in every if (row["text"], row["kind"]) == (text, kind)]
        dense = answers[(text, kind, DENSE, 0.0, "none")]
        made = [
            _line(row, dense, *(answers.get((text, kind, name, row["ratio"], how)) for name, how in (NIRVANA, BEST)))
            for row in mine
        ]
        found += sorted(made, key=lambda line: (line["ratio"], -line["accuracy"]))
    return sorted(found, key=lambda line: line["text"] != found[0]["text"])  # a text's lines stand together


def _model(row: Mapping[str, Any]) -> tuple[str, float, str]:
    return row["method"], row["ratio"], row["compensation"]


def _together(rows: Rows) -> list[dict[str, Any]]:
    """Return rows of both kinds of item."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["text"], *_model(row)), []).append(row)
    return [
        {
            **members[0],
            "kind": ALL,
            **{name: [each for row in members for each in row[name]] for name in ("answers", "documents", "texts")},
            "seconds": sum(row["seconds"] for row in members),
        }
        for members in groups.values()
        if len(members) > 1
    ]


def _units(documents: Sequence[str], texts: Sequence[str]) -> tuple[list[str], str]:
    """Return what of each item is drawn, its document or itself, and what that is called.

    Each text decides for itself, and two may call their documents alike.
    """
    of_text: dict[str, set[str]] = {}
    for document, text in zip(documents, texts, strict=True):
        of_text.setdefault(text, set()).add(document)
    whole = {text for text, held in of_text.items() if len(held) >= _LEAST_DOCUMENTS}
    units = [
        document if text in whole else f"item {number}"
        for number, (document, text) in enumerate(zip(documents, texts, strict=True))
    ]
    return units, "documents" if len(whole) == len(of_text) else "documents or items" if whole else "items"


def _line(
    row: Mapping[str, Any], dense: Sequence[int], nirvana: Sequence[int] | None, best: Sequence[int] | None
) -> Line:
    answers, texts = row["answers"], row["texts"]
    units, drawn = _units(row["documents"], texts)
    low, high = accuracy_interval(answers)
    lost = paired_bootstrap(dense, answers, groups=units, strata=texts)
    share = ratio_of_losses(dense, answers, nirvana, units, texts) if nirvana is not None else None
    rival = best is not None and (row["method"], row["compensation"]) != BEST
    behind = paired_bootstrap(best, answers, groups=units, strata=texts) if best is not None and rival else None
    line = {name: row[name] for name in ("text", "kind", "method", "compensation", "ratio", "achieved_ratio")}
    line |= {"called": called(row["method"], row["compensation"]), "items": len(answers), "drawn": drawn}
    line |= {"documents": len(set(zip(row["documents"], texts, strict=True)))}
    line |= {"accuracy": float(np.mean(answers)), "accuracy_low": low, "accuracy_high": high}
    line |= _interval("lost", lost) | _interval("behind_best", behind) | _interval("of_nirvana", share)
    if share is None and row["method"] != DENSE:
        line |= {f"of_nirvana{end}": UNDEFINED for end in ("", "_low", "_high")}
    line |= {"percent": 100 * line["accuracy"], "percent_lost": 100 * lost.difference}
    return line | {"seconds_per_item": row["seconds"] / len(answers)}


def _interval(name: str, interval: Interval | Ratio | None) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True)) if interval else {}


def verdict(tables: Mapping[str, Sequence[Line]], _rows: Rows, _values: Mapping[str, Any]) -> list[str]:
    """Say of each text, ratio and kind of item what share of NIRVANA's loss ours is, and whom it is ahead of."""
    found, sentences = tables[""], []
    # all items first: they are the surest
    keys = dict.fromkeys((line["text"], line["ratio"], line["kind"]) for line in found if line["method"] != DENSE)
    for text, ratio, kind in sorted(keys, key=lambda key: (key[0] != ALL_TEXTS, key[2] != ALL)):
        among = [x for x in found if (x["text"], x["ratio"], x["kind"]) == (text, ratio, kind)]
        ours, theirs = (
            next((x for x in among if (x["method"], x["compensation"]) == each), None) for each in (BEST, NIRVANA)
        )
        if ours is None or theirs is None:
            continue
        sentence = f"{text}, ratio {ratio:g}, {kind}: {ours['called']} loses {100 * ours['lost']:.1f} points, "
        sentence += f"{theirs['called']} {100 * theirs['lost']:.1f}; "
        sentences.append(f"{sentence}their ratio is {_share(ours)}.{_standing(among)}")
    return sentences or [f"No ratio of losses: it takes {called(*NIRVANA)} and {called(*BEST)} among the methods."]


def _share(ours: Line) -> str:
    value, low, high = (ours[f"of_nirvana{end}"] for end in ("", "_low", "_high"))
    if value == UNDEFINED:
        return "undefined, for the latter is not significantly above 0"
    how = {"better": "significantly at most half", "worse": "significantly more than half"}
    sure = how.get(stands(low - HALF, high - HALF) if high != HALF else "better", "not significantly apart from half")
    return f"{value:.2f} [{low:.2f}, {f'{high:.2f}' if math.isfinite(high) else '∞'}], {sure}"


def _standing(among: Sequence[Line]) -> str:
    """Say how many others ours is significantly ahead of, where there are more than NIRVANA."""
    found: dict[str, list[str]] = {"worse": [], "better": [], "": []}
    for line in among:
        if line.get("behind_best") is not None:
            found[stands(line["behind_best_low"], line["behind_best_high"])].append(line["called"])
    others = sum(map(len, found.values()))
    if others < 2:
        return ""
    said = f" It is significantly better (95 %) than {len(found['worse'])} of {others} others"
    said += f", not significantly apart from {', '.join(found[''])}" if found[""] else ""
    return said + (f", significantly worse than {', '.join(found['better'])}." if found["better"] else ".")
