"""The study of families: each is trained, pruned and judged alike, no part twice, and the words fit the rows."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeps import counted
from tiny import tiny_corpus, tiny_recipe

from nirvana.architectures.registry import describe
from nirvana.errors import InputError
from nirvana.walk import Stack
from studies import families, tiny_model
from studies.comparison import BEST, Comparison
from studies.families import agreement, check, variants_of
from studies.lines import lines_of
from studies.measure import UNREACHABLE
from studies.spec import load_spec
from studies.subject import Asked, Subject
from studies.tiny_model import FAMILIES, build_model
from studies.words import series_of, verdict
from tasks.params import load_params

ROOT = Path(__file__).resolve().parents[2]
RECIPE = tiny_recipe(steps=3)
SPEC = load_spec("families")
SETTINGS = SPEC.values(False, {}) | asdict(RECIPE)
SETTINGS |= {"families": ["llama", "phi3"], "methods": ["fisher", "nirvana"], "ratios": [0.3]}
SETTINGS |= {"calibration_sequences": 2, "compensation_sequences": 6, "windows": 4}
del SETTINGS["family"]


def measure(corpus, **changed):
    return families.rows(Subject(Asked(processes=1), {"corpus": corpus}), SPEC, SETTINGS | changed)


def lines_by_hand(rows):
    return lines_of(rows, SPEC.tables[0])


def ways_of(method):
    return [(each.method, each.compensation) for each in variants_of(SETTINGS, method, 0)]


# --- models and texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_described_and_trained(family, tmp_path):
    recipe = replace(RECIPE, family=family)
    text = tiny_model.Text(torch.randint(0, 128, (500,)), torch.randint(0, 128, (500,)))
    model = build_model(recipe, 0)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    tiny_model.train(model, text, recipe, np.random.default_rng(0))
    model.save_pretrained(tmp_path)
    architecture = describe(tmp_path)
    assert architecture.model_type == family
    sites = architecture.sites()
    assert [(site.module, site.units) for site in sites] == [("attention", 2), ("mlp", 24)] * 2
    # biases and norms learn too: those of a fresh model are all zero or one
    assert all(not torch.equal(each, before[name]) for name, each in model.named_parameters() if each.ndim == 1)
    ids = text.spread(4, 16)
    hidden = Stack.open(tmp_path)
    losses = [float(tiny_model.mean_loss(model, each[None])) for each in ids]
    from nirvana.walk import final_hidden_states
    from studies.comparison import window_losses

    judged = window_losses(hidden, final_hidden_states(hidden, ids), ids)
    np.testing.assert_allclose(judged, losses, rtol=1e-4)


def test_what_sets_families_apart():
    names = {
        family: set(dict(build_model(replace(RECIPE, family=family), 0).named_parameters())) for family in FAMILIES
    }
    layer = "model.layers.0."
    assert names["llama"] == names["mistral"]
    assert names["qwen2"] - names["llama"] >= {f"{layer}self_attn.{each}_proj.bias" for each in "qkv"}
    assert names["qwen3"] - names["llama"] >= {f"{layer}self_attn.{each}_norm.weight" for each in "qk"}
    assert names["phi3"] - names["llama"] >= {f"{layer}self_attn.qkv_proj.weight", f"{layer}mlp.gate_up_proj.weight"}
    assert f"{layer}post_feedforward_layernorm.weight" in names["gemma3_text"]
    assert build_model(replace(RECIPE, family="mistral"), 0).config.sliding_window == 4 < RECIPE.length


def test_texts_are_disjoint_and_compensation_begins_with_calibration():
    """Token ids that are places: training text below 5,000, held-out text above."""
    text = tiny_model.Text(torch.arange(5000), torch.arange(5000, 6000))
    texts = families.texts_of(text, SETTINGS, 0)
    heldout, evaluation = ({*each.ids.flatten().tolist()} for each in (texts.heldout, texts.evaluation))
    assert len(heldout) == len(evaluation) == 4 * 16 and not heldout & evaluation
    assert min(heldout | evaluation) >= 5000 > int(texts.compensation.ids.max())
    assert torch.equal(texts.calibration.ids, texts.compensation.ids[:2])
    other = families.texts_of(text, SETTINGS, 1)
    assert torch.equal(other.evaluation.ids, texts.evaluation.ids)  # one judge for all
    assert not torch.equal(other.calibration.ids, texts.calibration.ids)


def test_unigram_loss_by_hand():
    """Of tokens 0, 0, 1 counted once more each: 3/5 and 2/5; a window's first token is given."""
    text = tiny_model.Text(torch.tensor([0, 0, 1]), torch.tensor([]))
    expected = -(np.log(3 / 5) + np.log(2 / 5)) / 2
    assert families.unigram_loss(text, torch.tensor([[1, 0, 1]]), 2) == pytest.approx(expected)


def test_what_cannot_be_is_one_line():
    with pytest.raises(InputError, match=r"^families: expected some of llama,qwen2,.*gemma3_text, got bert; correct"):
        check(SETTINGS | {"families": ["llama", "bert"]})
    with pytest.raises(InputError, match="expected fisher among them"):
        check(SETTINGS | {"methods": ["nirvana"]})
    with pytest.raises(InputError, match="got 'flop'"):
        check(SETTINGS | {"methods": ["fisher", "flop"]})


def test_a_held_out_text_that_is_too_short_is_said_before_training(corpus, monkeypatch):
    monkeypatch.setattr(tiny_model, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(InputError, match="held-out text: expected 20000 sequences of 16 tokens"):
        measure(corpus, windows=10_000)


# --- all of it ------------------------------------------------------------------------------------------------


def test_rows_are_measured_once(corpus, monkeypatch):
    rows = measure(corpus)
    assert [(row["family"], row["method"], row["compensation"]) for row in rows] == [
        (family, *way)
        for family in ("llama", "phi3")
        for way in (("dense", "none"), *(way for method in SETTINGS["methods"] for way in ways_of(method)))
    ]
    assert ways_of("flap") == [("flap", "none"), ("flap", "bias"), ("flap", "least_squares")]
    families.comparison_of.cache_clear()  # as in another process
    with monkeypatch.context() as patched, counted(patched) as judged:
        patched.setattr(tiny_model, "train", lambda *_: pytest.fail("trained again"))
        assert measure(corpus) == rows
        assert judged == []


def test_a_method_that_refuses_a_family_is_left_out(corpus, monkeypatch):
    original = Comparison.row

    def row(self, variant):
        if variant.method == "nirvana" and describe(self.model_directory).model_type == "phi3":
            raise InputError("no such layout")
        return original(self, variant)

    monkeypatch.setattr(Comparison, "row", row)
    rows = measure(corpus)
    assert {row["family"]: row[UNREACHABLE] for row in rows if UNREACHABLE in row} == {"phi3": "no such layout"}
    assert [line["family"] for line in lines_by_hand(rows) if line["method"] == "nirvana"] == ["llama"] * 2


# --- what is said ---------------------------------------------------------------------------------------------


def _row(family, method, compensation, ratio, losses, seed=0):
    judged = {"losses": losses, "kl_divergence": 0.5, "achieved_ratio": ratio}
    return {"family": family, "seed": seed, "method": method, "compensation": compensation, "ratio": ratio} | judged


def _made(ratio=0.3):
    """Three windows. In llama best leads; in phi3 nirvana is worse for sure, flap better, magnitude not apart."""
    rows = []
    for family, losses in {
        "llama": {BEST: [2, 3, 4], ("nirvana", "none"): [3, 4, 5], ("flap", "bias"): [2.5, 3.5, 5]},
        "phi3": {BEST: [2, 3, 4], ("nirvana", "none"): [3, 4, 5], ("flap", "bias"): [1, 2, 3.5]},
    }.items():
        losses[("magnitude", "none")] = [4, 5, 6] if family == "llama" else [1, 3.2, 6]
        rows.append(_row(family, "dense", "none", 0.0, [1, 2, 3]))
        rows += [_row(family, *way, ratio, values) for way, values in losses.items()]
    return rows


def test_lines_and_verdict_by_hand():
    lines = lines_by_hand(_made())
    above = {(line["family"], line["method"]): line["above_dense"] for line in lines}
    assert above["llama", "flap"] == pytest.approx(5 / 3) and above["phi3", "flap"] == pytest.approx(1 / 6)
    assert above["llama", "fisher"] == above["phi3", "fisher"] == 1 and above["phi3", "magnitude"] == pytest.approx(1.4)
    llama, phi3 = verdict(lines, SPEC.verdict[0])
    assert "significantly better (95 %) than 3 of 3 others" in llama
    assert "than 1 of 3 others, not significantly apart from magnitude, significantly worse than FLAP + bias" in phi3
    # llama: best, flap, nirvana, magnitude; phi3: flap, best, magnitude, nirvana. 1 − 6·4 / (4·15)
    (told,) = agreement({"": lines}, [], {"ratios": [0.3], "families": ["llama", "phi3"]})
    assert told.startswith("Ratio 0.3: rank correlation of two families' orders of 4 rows is 0.60 on average")
    (phi3,) = (each for each in series_of(lines, SPEC.series[0])["magnitude"] if "phi3" in each.metric)
    assert phi3.metric == "phi3_above_dense_by_ratio_percent" and phi3.points == [(30, pytest.approx(1.4))]


def test_several_models_are_averaged_and_widen_the_interval():
    rows = _made()
    again = [
        row | {"seed": 1, "losses": [each + (row["method"] == "nirvana") for each in row["losses"]]} for row in rows
    ]
    (line,) = (x for x in lines_by_hand(rows + again) if (x["family"], x["method"]) == ("llama", "nirvana"))
    assert line["models"] == 2 and line["above_best"] == pytest.approx(1.5)
    assert (line["low"], line["high"]) == (pytest.approx(1), pytest.approx(2))  # both the one, or both the other


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """The code and a params.yaml with a corpus of its own: nothing of the repository's is written."""
    path = tmp_path / "checkout"
    path.mkdir()
    for part in ("flows", "studies", "tasks", "nirvana"):
        shutil.copytree(ROOT / part, path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", path / "pyproject.toml")
    tiny_corpus(tmp_path / "corpus", documents=120, sentences=120)
    values = asdict(load_params(ROOT / "params.yaml"))
    values["corpus"] |= {"source": f"path:{tmp_path}/corpus/*.txt"}
    (path / "params.yaml").write_text(json.dumps(values))  # JSON is YAML
    return path


def _run(checkout, *options):
    variables = os.environ | {"PREFECT_HOME": str(checkout / ".prefect"), "PYTHONPATH": str(checkout)}
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        variables.pop(name, None)
    command = [sys.executable, "-m", "flows.families", *options]
    return subprocess.run(
        command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=1500, check=False
    )


@pytest.mark.slow
def test_quick_runs_from_text_to_record(checkout):
    done = _run(checkout, "--quick", "--processes=1", "--families=llama,phi3")
    assert done.returncode == 0, done.stderr
    assert "Ratio 0.4, llama: mask Fisher + LS (loss" in done.stdout
    assert "MLflow run" in done.stdout
    written = sorted(file.name for file in (checkout / "reports/studies").iterdir())
    assert written == ["families.csv", "families.png", "families.svg"]


@pytest.mark.slow
def test_an_unknown_family_is_one_line(checkout):
    done = _run(checkout, "--families=bert")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: families: expected some of llama,") and line.endswith("got bert; correct them")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
