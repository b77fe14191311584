"""The fine-tuning study: rows against training by hand, one recipe for all, nothing trained twice, tables by hand."""

from types import SimpleNamespace

import pytest
import torch
from tiny import random_ids, save_family, tiny_corpus, tiny_llama
from torch import nn

from nirvana import recovery
from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.methods.registry import SHORTGPT
from nirvana.recovery import Recipe
from studies import fine_tuning as study
from studies.biases import write_with_biases
from studies.comparison import Comparison, Text, Texts
from studies.fine_tuning import Tuning, curves, learned, name_dense, read_training, recipe_of
from studies.lines import lines_of, shown
from studies.spec import load_spec
from studies.variants import DENSE, Variant
from studies.words import verdict
from tasks import sample_pool
from tasks.corpus.documents import Document, write_documents
from tasks.params import Recovery
from tasks.recovery.recovery_text import training_text

RATIO = 0.5
RECOVERY = Recovery(
    tokens=0,
    seed=0,
    rank=4,
    alpha=8,
    learning_rate=0.01,
    warmup=0.1,
    distillation=0.5,
    sequence_length=16,
    batch=2,
    curve_every=8192,
    merge=True,
)
RECIPE = recipe_of(RECOVERY, 4 * 2 * 16)
WAYS = (("nirvana", "none"), ("random", "least_squares"), ("flap", "bias"), (SHORTGPT, "none"))
WHOLE = (DENSE, "none")
SPEC = load_spec("fine_tuning")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """Wide enough that a neuron is a small share of it."""
    return tiny_llama(tmp_path_factory.mktemp("fine-tuning") / "model", intermediate_size=256)


def made(model_directory, recipe=RECIPE, training=4):
    texts = Texts(*(Text(random_ids(6, 16, seed)) for seed in range(4)))
    comparison = Comparison(model_directory, texts, round_to=1)
    return Tuning(comparison, Text(random_ids(5, 16, training)), recipe, torch.device("cpu"))


def variant(name, compensation="none", ratio=RATIO):
    return Variant(name, 0.0 if name == DENSE else ratio, compensation)


def measure(tuning, ways):
    return [tuning.comparison.dense(), *(tuning.tuned(variant(*way)) for way in ways)]


@pytest.fixture
def tuning(model_directory, tmp_path, monkeypatch):
    """Its cache goes beside the test."""
    monkeypatch.chdir(tmp_path)
    return made(model_directory)


@pytest.fixture
def batches(monkeypatch):
    """Every batch that is trained on, and how many adapters had been attached by then."""
    seen, attached = [], []
    backward, attach = recovery._backward, recovery.attach

    def watched(student, teacher, ids, recipe):
        assert teacher is None  # nothing is distilled
        seen.append((len(attached), ids[0].tolist()))
        return backward(student, teacher, ids, recipe)

    monkeypatch.setattr(recovery, "_backward", watched)
    monkeypatch.setattr(recovery, "attach", lambda *given: attached.append(1) or attach(*given))
    return seen


@torch.no_grad()
def losses_by_hand(model, ids):
    logits = model(ids).logits[:, :-1].double()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1).tolist()


# --- rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "compensation"), WAYS)
def test_a_row_is_that_of_the_checkpoint_before_and_of_the_merged_one_after(name, compensation, tuning, monkeypatch):
    judged, original = {}, study.merge

    def merge(checkpoint, adapter, directory):
        original(checkpoint, adapter, directory)
        for when, place in (("before", checkpoint), ("after", directory)):
            model = load_model(place)
            judged[when] = losses_by_hand(model, tuning.comparison.texts.evaluation.ids)
            judged[f"{when} heldout"] = losses_by_hand(model, tuning.comparison.texts.heldout.ids)

    monkeypatch.setattr(study, "merge", merge)
    row = tuning.tuned(variant(name, compensation))
    assert row["before"] == pytest.approx(judged["before"], rel=1e-5)
    assert row["after"] == pytest.approx(judged["after"], rel=1e-4)
    curve = [point["heldout_loss"] for point in row["curve"]]
    means = [sum(judged[f"{when} heldout"]) / 6 for when in ("before", "after")]
    assert [curve[0], curve[-1]] == pytest.approx(means, rel=1e-4) and curve[0] != curve[-1]
    assert [point["tokens"] for point in row["curve"]] == [0, 32, 64, 96, 128]
    assert row["dense_heldout_loss"] == pytest.approx(
        sum(losses_by_hand(load_model(tuning.comparison.model_directory), tuning.comparison.texts.heldout.ids)) / 6,
        rel=1e-5,
    )
    assert row["achieved_ratio"] == pytest.approx(RATIO, abs=0.01) and row["seconds_a_step"] > 0


def test_before_training_a_row_is_the_comparisons(tuning):
    rows = measure(tuning, WAYS)
    assert rows[0]["losses"] == tuning.comparison.dense()["losses"]
    for (name, compensation), row in zip(WAYS, rows[1:], strict=True):
        assert row["before"] == pytest.approx(tuning.comparison.row(variant(name, compensation))["losses"], rel=1e-5)
    assert not list(tuning_folder().glob(".*tmp")) and not list(tuning_folder().glob("*.states"))


def test_the_dense_model_is_trained_on_the_same(tuning, batches):
    untrained, whole, pruned = measure(tuning, (WHOLE, WAYS[0]))
    assert whole["before"] == pytest.approx(untrained["losses"], rel=1e-5) and whole["achieved_ratio"] == 0
    assert (whole["method"], whole["ratio"], pruned["ratio"]) == (DENSE, 0.0, RATIO)
    assert whole["after"] != pytest.approx(whole["before"], rel=1e-3)
    of_model = [[ids for model, ids in batches if model == number] for number in (1, 2)]
    assert of_model[0] == of_model[1] and len(of_model[0]) == RECIPE.steps
    assert (tuning.comparison.model_directory / "model.safetensors").exists()


def tuning_folder():
    return study.STUDIES / study.STUDY


def test_training_lowers_the_loss_on_what_is_trained_on(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuning = made(model_directory, recipe_of(RECOVERY, 40 * 32))
    first, *_, last = (point["training_loss"] for point in tuning.tuned(variant("random"))["curve"][1:])
    assert last < first - 0.5


def test_every_method_reads_the_same_rows_in_the_same_order(tuning, batches):
    measure(tuning, WAYS)
    of_model = [[ids for model, ids in batches if model == number] for number in (1, 2, 3, 4)]
    assert all(each == of_model[0] for each in of_model) and len(of_model[0]) == RECIPE.steps == 4
    rows = [row for batch in of_model[0] for row in batch]
    text = tuning.training.ids.tolist()
    assert sorted(rows[:5]) == sorted(text)  # each once before any comes again


# --- what is kept ---------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_a_second_run_trains_nothing(tuning, model_directory, batches, monkeypatch):
    uninterrupted = [
        {key: value for key, value in row.items() if not key.endswith("_step")} for row in measure(tuning, WAYS)
    ]
    assert len(batches) == 4 * 4
    for file in tuning_folder().rglob("*"):
        file.unlink()
    batches.clear()

    original = recovery.learning_rate_at

    def dies(step, recipe):
        if len(batches) == 4 + 3:  # in the second model's third step: two are behind it, and saved
            raise KeyboardInterrupt
        return original(step, recipe)

    monkeypatch.setattr(recovery, "learning_rate_at", dies)
    with pytest.raises(KeyboardInterrupt):
        measure(tuning, WAYS)
    assert len(list(tuning_folder().glob("*.json"))) == 1 and len(list(tuning_folder().glob("*.states/*"))) == 1
    batches.clear()
    monkeypatch.setattr(recovery, "learning_rate_at", original)
    rows = measure(made(model_directory), WAYS)
    assert len(batches) == 2 + 4 + 4  # the second model's steps 3 and 4, the others' all
    assert [{key: row[key] for key in kept} for row, kept in zip(rows, uninterrupted, strict=True)] == uninterrupted
    assert not list(tuning_folder().glob("*.states"))
    batches.clear()
    last = made(model_directory)
    assert measure(last, WAYS) == rows and batches == []
    assert "stack" not in vars(last.comparison)  # nothing was opened


@pytest.mark.parametrize("changed", [{"recipe": recipe_of(RECOVERY, 64)}, {"training": 5}])
def test_another_recipe_or_text_is_trained_anew(changed, tuning, model_directory, batches):
    tuning.tuned(variant("random"))
    batches.clear()
    made(model_directory, **changed).tuned(variant("random"))
    assert batches


# --- what is trained on, and what cannot be -------------------------------------------------------------------


def test_the_recipe_is_the_pipelines_but_for_the_dense_models_word():
    recipe = recipe_of(RECOVERY, 100 * 32 + 5)
    expected = {"rank": 4, "alpha": 8, "learning_rate": 0.01, "distillation": 0.0, "steps": 100, "curve_every": 13 * 32}
    assert {name: getattr(recipe, name) for name in expected} == expected and isinstance(recipe, Recipe)
    assert recipe_of(RECOVERY, 12 * 32).curve_every == 2 * 32  # six points, not twelve
    assert SPEC.values(False, {})["training_tokens"] == 24 * 1024


def test_training_text_is_of_the_calibration_split(model_directory, tmp_path):
    speeches = sorted(tiny_corpus(tmp_path / "speeches").iterdir())
    documents = [Document(file.name, file.read_text()) for file in speeches]
    (tmp_path / "corpus").mkdir()
    write_documents(tmp_path / "corpus" / "documents.jsonl", documents)
    params = SimpleNamespace(calibration=SimpleNamespace(add_bos=False))
    found = read_training(params, model_directory, tmp_path / "corpus", RECIPE)
    encoder = sample_pool.Encoder.of_model(model_directory, add_bos=False)
    allowed = sample_pool.split_documents(documents)["calibration"]
    assert len(allowed) < len(documents)
    (expected,) = training_text(allowed, encoder, None, tokens=128, length=16, seed=0)
    assert torch.equal(found.ids, expected) and found.ids.shape == (8, 16)
    with pytest.raises(InputError, match=r"documents.jsonl: expected") as raised:
        read_training(params, model_directory, tmp_path / "nowhere", RECIPE)
    assert "\n" not in str(raised.value)


def test_a_bias_that_the_family_cannot_have_is_refused(tmp_path):
    save_family("mistral", tmp_path / "model")
    with pytest.raises(InputError, match=r"bias: expected a model of Llama's configuration, .* got mistral"):
        write_with_biases(tmp_path / "model", {}, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (("flop", "none"), "expected some of nirvana, fisher, .*, got 'flop'"),
        (("slicegpt", "none"), "expected a method that has a checkpoint, got slicegpt"),
        (("flap", "mean"), "flap: expected compensation none or bias or least_squares, got mean"),
        ((SHORTGPT, "least_squares"), "shortgpt: expected compensation none, got least_squares"),
        ((DENSE, "bias"), "dense: expected compensation none, got bias"),
    ],
)
def test_what_cannot_be_is_one_line(way, message, tuning):
    with pytest.raises(InputError, match=message) as raised:
        tuning.tuned(variant(*way))
    assert "\n" not in str(raised.value)


def test_too_few_tokens_are_one_line():
    with pytest.raises(InputError, match=r"--training-tokens: expected 32 or more, .* got 31; ask for more") as raised:
        recipe_of(RECOVERY, 31)
    assert "\n" not in str(raised.value)


# --- tables and picture ---------------------------------------------------------------------------------------


def made_row(method, before, after, compensation="none", curve=(3.0, 2.5)):
    points = [{"tokens": 32 * n, "training_loss": loss if n else None, "heldout_loss": loss, "heldout_kl": None}
              for n, loss in enumerate(curve)]  # fmt: skip
    found = {"method": method, "ratio": 0.4, "compensation": compensation, "achieved_ratio": 0.401}
    found |= {"adapter_parameters": 7, "curve": points, "dense_heldout_loss": 1.5, "seconds_a_step": 2.0}
    return found | {"before": before, "after": after, "trained": True, "tokens": points[-1]["tokens"]}


ROWS = [
    {"method": "dense", "ratio": 0.0, "compensation": "none", "trained": False, "before": [1.0, 2.0]},
    made_row("nirvana", [4.0, 6.0], [3.0, 3.5], curve=(5.0, 3.1)),
    made_row("fisher", [2.0, 4.0], [1.5, 3.0], "least_squares"),
    made_row("flap", [1.0, 5.0], [1.5, 2.5], curve=(3.2, 2.4)),
    made_row("wanda_sp", [2.5, 4.5], [3.5, 4.0], curve=(3.4, 3.6)),
]


def summary(rows):
    return list(name_dense(lines_of(rows, SPEC.tables[0]), rows, {}))


def interval(line, name):
    return tuple(line[f"{name}{end}"] for end in ("", "_low", "_high"))


def test_lines_by_hand():
    dense, *found = summary(ROWS)
    assert dense["before"] == 1.5 and dense.get("after") is None
    by_name = {line["method"]: line for line in found}
    # two windows: a resampled mean is one of the two differences or halfway, each end of the interval a difference
    assert interval(by_name["nirvana"], "above_before") == (2.0, 2.0, 2.0)
    assert interval(by_name["nirvana"], "above_after") == (1.0, 0.5, 1.5)
    assert interval(by_name["nirvana"], "gain") == (1.75, 1.0, 2.5)
    assert interval(by_name["flap"], "above_before") == (0.0, -1.0, 1.0)
    assert interval(by_name["flap"], "above_after") == (-0.25, -0.5, 0.0)
    assert interval(by_name["wanda_sp"], "gain") == (-0.25, -1.0, 0.5)
    assert interval(by_name["fisher"], "above_after") == (0.0, 0.0, 0.0)
    assert interval(by_name["fisher"], "gain") == (0.75, 0.5, 1.0)
    ((_, rows),) = shown([dense, *found], SPEC.tables[0]).items()
    assert rows[2][1:] == ["5.000", "3.250", "+1.750", "+2.00 [+2.00, +2.00]", "+1.00 [+0.50, +1.50]"]
    assert rows[3][-2:] == ["the reference"] * 2
    points = curves(ROWS, {})
    assert len(points) == 9 and (points[1]["model"], points[1]["tokens"], points[1]["heldout_loss"]) == (
        "NIRVANA",
        32,
        3.1,
    )


def test_the_dense_model_is_no_rival():
    whole = made_row(DENSE, [1.0, 2.0], [0.5, 1.5], curve=(1.5, 1.0)) | {"ratio": 0.0}
    found = summary([ROWS[0], whole, *ROWS[1:]])
    assert [line["called"] for line in found[:2]] == ["dense", "fine-tuned dense"]
    (sentence,) = verdict(found, SPEC.verdict[1])
    assert "significantly better (95 %) than 2 of 3 others, not significantly apart from FLAP" in sentence
    told, runs = learned({"": found}, ROWS, {})
    assert told.startswith("2 of 4 pruned models learn significantly") and "NIRVANA gains most (+1.750" in told
    assert told.endswith("; the dense model +0.500 by the same training.") and "one training run" in runs


def test_what_is_recorded_names_recipe_and_text(tuning):
    found = tuning.described()
    assert found["recipe"]["tokens"] == 128 and found["training"]["sequences_and_tokens"] == [5, 16]


def test_an_encoder_decoder_is_refused(tmp_path, monkeypatch):
    from tiny import tiny_t5

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a decoder-only model, got t5"):
        made(tiny_t5(tmp_path / "t5")).tuned(variant("nirvana"))
    assert not list(tmp_path.rglob("*.states"))
