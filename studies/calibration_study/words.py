"""The calibration study in words and tables, as files and for MLflow."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nirvana.files import atomic_file
from studies.bootstrap import Interval
from studies.calibration_study.summary import Line, Match, Rows, correlations, losses_of, matching, perplexity
from studies.comparison import DENSE
from studies.tracking import Series


def verdict(rows: Rows, corpus: str, found: Sequence[Line], pairs: Sequence[Match]) -> list[str]:
    """Say what was found, a sentence or two a question."""
    ranked = correlations(rows, corpus)
    of_corpus = ranked.pop(corpus)
    by_variant = {line.variant: line for line in found}
    blind = by_variant["any one"]
    pool = matching(rows, part="candidate", calibrated_on=corpus, judged_on=corpus)
    reach = [perplexity(losses_of([row])) for row in pool]
    chosen, hindsight = by_variant[f"lowest KL of {len(pool)}"], by_variant["best in hindsight"]
    elsewhere = "".join(f"; as perplexity on {judge} does, {_interval(each)}" for judge, each in ranked.items())
    sentences = [
        f"Selection: KL on the held-out batch ranks {len(pool)} batches as perplexity does with Spearman "
        f"{_interval(of_corpus)}{elsewhere}. Perplexity runs from {min(reach):.1f} to {max(reach):.1f}; the batch of "
        f"lowest KL gains {_gain(chosen)} nats a token over a batch taken blindly, the best in hindsight "
        f"{hindsight.gain:+.3f}."
    ]
    means = [line for line in found if line.part in ("best", "any")]
    if means:
        told = ", ".join(f"{line.variant} {_gain(line)}" for line in means)
        sentences.append(f"Averaged saliency, gain over a batch taken blindly: {told}.")
    for part, question in (("count", "More sequences"), ("length", "Longer ones, as many tokens")):
        each = [line for line in found if line.part == part]
        if each:
            told = ", ".join(f"{line.variant} {_with_deviation(line)}" for line in each)
            sentences.append(f"{question}: perplexity at {told}; a candidate has {_with_deviation(blind)}.")
    for pair in (each for each in pairs if each.calibrated_on != each.judged_on):
        interval = Interval(pair.disadvantage, pair.low, pair.high)
        sentences.append(
            f"Judged on {pair.judged_on}, a batch of {pair.calibrated_on} loses {_interval(interval, '+.3f')} nats a "
            f"token against a batch of its own kind, at {pair.loss_increase:.3f} above the dense model."
        )
    return sentences


def _interval(interval: Interval, how: str = ".2f") -> str:
    return f"{interval.difference:{how}} [{interval.low:{how}}, {interval.high:{how}}]"


def _gain(line: Line) -> str:
    return _interval(Interval(line.gain, line.low, line.high), "+.3f")


def _with_deviation(line: Line) -> str:
    return f"{line.token_perplexity:.1f}" + (f" ± {100 * line.deviation:.1f} %" if line.deviation is not None else "")


def line_table(found: Sequence[Line]) -> list[list[str]]:
    """Return the lines as text: a header, then one row each."""
    rows = [["calibrated on", "n", "KL", "perplexity", "± nats", "gain over any one"]]
    for line in found:
        deviation = "" if line.deviation is None else f"{line.deviation:.3f}"
        gain = "" if line.variant == "any one" else _gain(line)
        perplexity = f"{line.token_perplexity:.2f}"
        rows.append([line.variant, str(line.plans), f"{line.kl_divergence:.3f}", perplexity, deviation, gain])
    return rows


def match_table(pairs: Sequence[Match]) -> list[list[str]]:
    """Return the pairs as text: a header, then one row each."""
    rows = [["calibrated on", "judged on", "KL", "dense", "perplexity", "behind its own kind"]]
    for pair in pairs:
        behind = _interval(Interval(pair.disadvantage, pair.low, pair.high), "+.3f")
        shown = [f"{pair.kl_divergence:.3f}", f"{pair.dense_perplexity:.2f}", f"{pair.token_perplexity:.2f}"]
        own = pair.calibrated_on == pair.judged_on
        rows.append([pair.calibrated_on, pair.judged_on, *shown, "" if own else behind])
    return rows


def write_tables(rows: Rows, found: Sequence[Line], pairs: Sequence[Match], path: Path) -> list[Path]:
    """Write every plan, and beside it what follows from them, as CSV, not rounded."""
    plans = [
        {name: value for name, value in row.items() if name != "losses"}
        | {"token_perplexity": perplexity(losses_of([row]))}
        for row in rows
    ]
    files = [_write(path, list(plans[0]), plans)]
    for name, kind, each in (("summary", Line, found), ("domains", Match, pairs)):
        if each:
            file = path.with_name(f"{path.stem}_{name}.csv")
            files.append(_write(file, [field.name for field in fields(kind)], [asdict(line) for line in each]))
    return files


def _write(path: Path, header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def series(rows: Rows) -> dict[str, list[Series]]:
    """Return KL and perplexity of every plan as MLflow takes them: a child a part and pair of texts, a step a plan."""
    result: dict[str, list[Series]] = {}
    for key in dict.fromkeys(_child(row) for row in rows):
        members = [row for row in rows if _child(row) == key]
        values = {
            "kl_divergence": [float(row["kl_divergence"]) for row in members],
            "token_perplexity": [perplexity(losses_of([row])) for row in members],
        }
        result[key] = [Series(metric, list(enumerate(each))) for metric, each in values.items()]
    return result


def _child(row: Mapping[str, Any]) -> str:
    if row["part"] == DENSE:
        return f"dense on {row['judged_on']}"
    if row["part"] == "candidate":
        return f"candidates of {row['calibrated_on']} on {row['judged_on']}"
    shape = f"{row['sequences']} × {row['length']}"
    return f"{row['part']} {row['averaged']}" if row["part"] in ("best", "any") else f"{row['part']} {shape}"
