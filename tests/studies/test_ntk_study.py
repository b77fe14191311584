"""The kernel study: K as defined, of exactly the weights that pruning may remove, and no part computed twice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_ids, random_keep, tiny_llama, tiny_recipe

from nirvana.allocation import Allocation
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.plan import Plan
from nirvana.saliency import channel_saliency
from nirvana.surgery import prune
from nirvana.walk import Stack
from nirvana.weights import model_digest
from studies import ntk, store, tiny_model
from studies.spec import load_spec
from studies.store import cached
from studies.tracking import record_study
from studies.words import series_of

RECIPE = tiny_recipe(steps=6)
SETTINGS = ntk.Settings(
    RECIPE,
    seeds=2,
    ratios=(0.2, 0.5),
    kernel_sequences=4,
    calibration_sequences=4,
    loss_sequences=4,
    finetuned_ratio=0.5,
    gamma=3.36,
    finetuning_steps=4,
    finetuning_rate=1e-3,
    curve_every=2,
)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("ntk") / "model")


# --- the kernel -----------------------------------------------------------------------------------------------


def test_kernel_of_a_function_of_two_parameters():
    """f(x) = a·b·x at a = 2, b = −3: ∂f/∂(a, b) = (−3x, 2x)."""
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    rows = [torch.stack(torch.autograd.grad(a * b * x, (a, b))) for x in (1.0, -2.0)]
    kernel = ntk.signgd_kernel(torch.stack(rows))
    # ⟨(−3, 2), (−, +)⟩ = 5, ⟨(−3, 2), (+, −)⟩ = −5, ⟨(6, −4), (−, +)⟩ = −10, ⟨(6, −4), (+, −)⟩ = 10
    assert kernel.tolist() == [[5, -5], [-10, 10]]


def test_a_zero_gradient_has_no_sign():
    assert ntk.signgd_kernel(torch.tensor([[0.0, 2.0], [-1.0, -3.0]])).tolist() == [[2, -2], [-3, 4]]


def test_kernel_of_a_model_is_the_double_sum_over_its_block_weights(model_directory):
    model, ids = load_model(model_directory), random_ids(3, 12)
    block = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    assert len(block) == 14  # q, k, v, o, gate, up, down of two layers

    def gradient(sequence):
        model.zero_grad()
        logits = model(sequence[None]).logits  # 1/(B·V) Σ_v max_t z with B = 1
        (sum(logits[0, :, v].max() for v in range(512)) / 512).backward()
        return {name: parameter.grad.clone() for name, parameter in block.items()}

    each = [gradient(sequence) for sequence in ids]
    expected = [[sum(float((g[n].double() * h[n].sign().double()).sum()) for n in block) for h in each] for g in each]
    kernel = ntk.signgd_kernel(ntk.block_gradients(model, Stack.open(model_directory).architecture.sites(), ids))
    np.testing.assert_allclose(kernel, expected, rtol=1e-4)
    assert not np.allclose(kernel, kernel.T, rtol=1e-3)


def test_f_is_the_objective_that_saliency_differentiates(model_directory):
    stack, ids = Stack.open(model_directory), random_ids(1, 16)
    channels = channel_saliency(stack, ids)
    model, sites = load_model(model_directory), stack.architecture.sites()
    assert float(ntk.objective(model, ids).detach()) == pytest.approx(channels.objective, rel=1e-5)
    names = sorted({slot.parameter for site in sites for slot in site.weight_slots})
    weights = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    saliency = (weights * ntk.block_gradients(model, sites, ids)[0]).abs().sum()
    # every weight matrix has one slot, so each weight is in one channel's sum
    assert float(saliency) == pytest.approx(sum(float(sums.sum()) for sums in channels.sums.values()), rel=1e-4)


def test_masked_and_pruned_models_have_the_same_kernel(model_directory, tmp_path):
    stack, ids = Stack.open(model_directory), random_ids(4, 12)
    sites = stack.architecture.sites()
    keep = random_keep(sites, share=0.5)
    masked = load_model(model_directory)
    ntk.mask_units(masked, sites, keep)
    gradients = ntk.block_gradients(masked, sites, ids)
    removed = sum((site.units - len(keep[site.name])) * site.weights_per_unit for site in sites)
    assert int((gradients == 0).all(dim=0).sum()) == removed > 0

    plan = Plan.build(
        sites,
        keep,
        model_digest=model_digest(model_directory),
        model_type="llama",
        calibration_digest="none",
        allocation=Allocation(0.5, gamma=1.0),
    )
    prune(model_directory, plan, tmp_path / "pruned")
    pruned = load_model(tmp_path / "pruned")
    weights = [p for name, p in pruned.named_parameters() if name.endswith("_proj.weight")]
    rows = [torch.autograd.grad(ntk.objective(pruned, ids[[i]]), weights) for i in range(4)]
    expected = ntk.signgd_kernel(torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]))
    torch.testing.assert_close(ntk.signgd_kernel(gradients), expected, rtol=1e-4, atol=1e-6)


def test_relative_change_and_alignment():
    dense = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert ntk.relative_change(dense, dense) == 0
    assert ntk.relative_change(torch.zeros(2, 2), dense) == 1
    assert ntk.relative_change(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), dense) == pytest.approx(3 / 5)
    assert ntk.alignment(2 * dense, dense) == pytest.approx(1)
    assert ntk.alignment(torch.tensor([[4.0, 0.0], [0.0, -3.0]]), dense) == pytest.approx(0, abs=1e-7)


# --- what is left ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ntk.METHODS)
def test_every_method_spends_the_same_budget(method, corpus):
    subject = ntk.subject_of(SETTINGS, 0, corpus)
    model, achieved = subject.pruned(method, 0.5)
    largest = max(site.weights_per_unit for site in subject.sites if site.module == "mlp")
    assert abs(achieved - 0.5) <= largest / sum(site.weights for site in subject.sites)
    names = sorted({slot.parameter for site in subject.sites for slot in site.weight_slots})
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in names)
    assert zeros == round(achieved * sum(model.get_parameter(name).numel() for name in names))
    assert all((subject.model.get_parameter(name) != 0).any() for name in names)  # the dense one is untouched


def test_fine_tuning_starts_at_the_pruned_model_and_revives_nothing(corpus, monkeypatch):
    subject = ntk.subject_of(SETTINGS, 0, corpus)
    tuned, texts = [], []

    def step(model, ids, optimizer):
        tuned.append(model)
        texts.append(ids)
        return tiny_model.step(model, ids, optimizer)

    monkeypatch.setattr(ntk, "step", step)
    curves = {method: subject.curve(method) for method in ("nirvana", "random")}
    for method, of_method in curves.items():
        assert of_method["steps"] == [0, 2, 4]
        row = subject.kernel_row(method, 0.5)
        assert of_method["losses"][0] == row["loss"] != of_method["losses"][-1]
    before, after = subject.pruned("nirvana", 0.5)[0], tuned[0]
    for name, weight in before.named_parameters():
        if name.endswith("_proj.weight"):
            changed = after.get_parameter(name)
            assert (changed[weight == 0] == 0).all() and (changed[weight != 0] != weight[weight != 0]).any()
    assert all(torch.equal(one, other) for one, other in zip(texts[:4], texts[4:], strict=True))


# --- what is kept ---------------------------------------------------------------------------------------------


def test_a_value_is_computed_once_and_anew_when_its_key_changes_or_its_file_breaks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def ask(**parts):
        return cached({"study": "toy", **parts}, lambda: {"calls": calls.append(parts) or (len(calls), 0.1)})

    assert ask(model="a") == ask(model="a") == {"calls": [1, 0.1]}
    assert ask(model="b") == {"calls": [2, 0.1]}
    files = sorted((tmp_path / ".cache/studies/toy").iterdir())
    assert len(files) == 2 and all(len(file.stem) == 64 for file in files)
    for file in files:
        file.write_text(file.read_text()[:20])
    assert ask(model="a") == {"calls": [3, 0.1]}
    assert len(calls) == 3


def test_a_failing_part_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cached({"study": "toy"}, lambda: {"value": 1 / 0})
    assert not list(tmp_path.rglob("*.json"))


def test_an_edit_of_the_code_is_another_key(tmp_path, monkeypatch):
    def compute():
        return {}

    first = store.study_key({"study": "toy"}, compute)
    monkeypatch.setattr(store, "source_digest", lambda module: "edited")
    assert store.study_key({"study": "toy"}, compute) != first


def test_a_killed_study_goes_on_where_it_was(corpus, monkeypatch):
    settings = replace(SETTINGS, ratios=(0.2, 0.3, 0.4, 0.5))
    measured = []
    original = ntk.Trained.kernel_row

    def dies_at_the_third(subject, method, ratio):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(ratio)
        return original(subject, method, ratio)

    monkeypatch.setattr(ntk.Trained, "kernel_row", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ntk.kernel_rows(settings, 0, corpus, "nirvana")
    first, measured = measured, []
    ntk.subject_of.cache_clear()  # as in another process
    monkeypatch.setattr(tiny_model, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(ntk.Trained, "kernel_row", lambda s, m, r: measured.append(r) or original(s, m, r))
    rows = ntk.kernel_rows(settings, 0, corpus, "nirvana")
    assert (first, measured) == ([0.2, 0.3], [0.4, 0.5])
    assert [row["ratio"] for row in rows] == [0.2, 0.3, 0.4, 0.5]
    assert rows[0] == original(ntk.subject_of(settings, 0, corpus), "nirvana", 0.2)


def test_a_corpus_that_is_too_small_is_named(corpus):
    with pytest.raises(InputError, match="held-out text: expected 100000 sequences of 16 tokens"):
        ntk.subject_of(replace(SETTINGS, kernel_sequences=100_000), 0, corpus)


# --- all of it ------------------------------------------------------------------------------------------------


def test_the_study_from_text_to_means(corpus):
    rows = ntk.measured(SETTINGS, corpus, processes=1)
    kernels, curves = ntk.kernels(rows, {}), ntk.of_kind(rows, "curve")
    assert {(row["seed"], row["method"], row["ratio"]) for row in kernels} == {
        (seed, method, ratio) for seed in (0, 1) for method in ntk.METHODS for ratio in (0.2, 0.5)
    }
    assert [(each["seed"], each["method"]) for each in curves] == [
        (seed, method) for seed in (0, 1) for method in ("dense", *ntk.METHODS)
    ]
    assert all(np.isfinite(row["relative_change"]) and row["relative_change"] > 0 for row in kernels)
    assert len(ntk.points(rows, {})) == 2 * 4 * 3 and len(ntk.kernel_means(rows, {})) == 3 * 2
    assert len(ntk.verdict({}, rows, {})) == 2


@pytest.mark.slow
def test_two_processes_find_what_one_does(corpus, tmp_path):
    alone = ntk.measured(SETTINGS, corpus, processes=1)
    for file in (tmp_path / ".cache/studies/ntk").glob("*.json"):
        file.unlink()
    assert ntk.measured(SETTINGS, corpus, processes=2) == alone


@pytest.mark.slow
def test_a_study_is_recorded_once_with_its_children(tmp_path, monkeypatch):
    from tasks.tracking.mlflow_store import open_store

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rows = _made_up(nirvana=0.1, magnitude=0.2, random=0.3)
    lines, spec = ntk.kernel_means(rows, {}), load_spec("ntk")
    (tmp_path / "ntk.csv").write_text("method\n")
    asked = ({"gamma": 3.36, "recipe": {"hidden": 64}}, series_of(lines, spec.series[0]), [Path("ntk.csv")], "held")
    parent = record_study("ntk", *asked)
    assert record_study("ntk", *asked) == parent
    with open_store() as (client, experiment):
        assert client.get_run(parent).data.params == {"gamma": "3.36", "recipe.hidden": "64"}
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        assert sorted(child.info.run_name for child in children) == [
            f"ntk: {method}" for method in ("magnitude", "nirvana", "random")
        ]
        (ours,) = [child for child in children if child.info.run_name == "ntk: nirvana"]
        history = client.get_metric_history(ours.info.run_id, "relative_change_by_ratio_percent")
        assert [(point.step, point.value) for point in history] == [(20, pytest.approx(0.1)), (50, pytest.approx(0.1))]


# --- what is said ---------------------------------------------------------------------------------------------


def _made_up(**change: float):
    """Two seeds and two ratios; a method's kernel change is also what its curve ends above the dense one's."""
    kernels = [
        {
            "kind": "kernel",
            "seed": seed,
            "method": method,
            "ratio": ratio,
            "relative_change": value + 0.01 * seed - 0.005,
            "alignment": 1 - value,
            "loss": 3 + value,
        }
        for seed in (0, 1)
        for method, value in change.items()
        for ratio in (0.2, 0.5)
    ]
    curves = [
        {"kind": "curve", "seed": seed, "method": method, "steps": [0, 5], "losses": [4.0, 3 + value]}
        for seed in (0, 1)
        for method, value in {"dense": 0.0, **change}.items()
    ]
    return [*kernels, *curves]


def test_means_are_over_seeds_with_the_deviation_of_a_sample():
    first = ntk.kernel_means(_made_up(nirvana=0.1, magnitude=0.2, random=0.3), {})[0]
    assert (first["method"], first["ratio"], first["models"]) == ("nirvana", 0.2, 2)
    assert first["relative_change"] == pytest.approx(0.1)
    assert first["relative_change_deviation"] == pytest.approx(0.01 / np.sqrt(2))
    last = ntk.curve_means(_made_up(nirvana=0.1, magnitude=0.2, random=0.3), {})[-1]
    assert (last["method"], last["step"], last["above_dense"]) == ("random", 5, pytest.approx(0.3))


@pytest.mark.parametrize(("nirvana", "wins", "claim"), [(0.1, 2, "held, without exception"), (0.25, 0, "did not hold")])
def test_the_verdict_counts_models(nirvana, wins, claim):
    for sentence in ntk.verdict({}, _made_up(nirvana=nirvana, magnitude=0.2, random=0.3), {}):
        assert f"magnitude in {wins}" in sentence and "random in 2" in sentence and claim in sentence
