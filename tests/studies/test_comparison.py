"""The comparison: rows against checkpoints built by hand, one budget for all, nothing computed twice."""

import json
import math
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sweeps import pruned_model
from tiny import random_ids, save_family, tiny_corpus, tiny_llama, tiny_t5
from torch import nn

from benchmarks import quality
from nirvana.allocation import allocate
from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.input_statistics import input_statistics
from nirvana.loading import load_model
from nirvana.methods.flap import bias_compensation
from nirvana.methods.registry import METHODS, SHORTGPT, SLICEGPT
from nirvana.methods.shortgpt import write_shortgpt
from nirvana.methods.slicegpt import slicegpt, slicegpt_hidden_states
from nirvana.methods.slicegpt_size import dimension_for, sliced_size
from nirvana.walk import Stack, final_hidden_states
from studies import comparison as judging
from studies import methods as registry
from studies import store
from studies.comparison import Comparison, Text, Texts
from studies.measure import rows as rows_of
from studies.spec import load_spec
from studies.subject import Asked
from studies.texts import judged_on, texts_of_ids, texts_of_pipeline, with_generated
from studies.variants import Variant
from tasks import sample_pool
from tasks.corpus.documents import Document, read_documents, write_documents
from tasks.generate_text import written_by
from tasks.sources.model_directory import load_tokenizer

RATIO = 0.4


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """Wide enough that a neuron is a small share of it."""
    return tiny_llama(tmp_path_factory.mktemp("compare") / "model", intermediate_size=256)


def texts(seed=0):
    return Texts(*(Text(random_ids(6, 16, seed + i)) for i in range(4)))


@pytest.fixture
def comparison(model_directory, tmp_path, monkeypatch):
    """Its cache goes beside the test."""
    monkeypatch.chdir(tmp_path)
    return Comparison(model_directory, texts(), round_to=1)


def measure(comparison, methods, ratios, seeds=1):
    """The rows of the study `compare`."""
    values = {"methods": list(methods), "ratios": list(ratios), "seeds": seeds}
    subject = SimpleNamespace(comparison=comparison, asked=Asked(), notes=[], parameters={})
    return rows_of(subject, load_spec("compare"), values)


@torch.no_grad()
def expected_row(dense, pruned, given):
    """KL, losses and size by transformers alone."""
    ids = given.heldout.ids
    p, q = (model(ids).logits.double().log_softmax(-1) for model in (dense, pruned))
    divergences = (p.exp() * (p - q)).sum(-1).mean(dim=1)
    ids = given.evaluation.ids
    logits = pruned(ids).logits[:, :-1].double()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)
    return {
        "kl_divergence": pytest.approx(float(divergences.mean()), rel=1e-4),
        "divergences": pytest.approx(divergences.tolist(), rel=1e-4, abs=1e-6),
        "losses": pytest.approx(losses.tolist(), rel=1e-5),
        "parameters": sum(parameter.numel() for parameter in pruned.parameters()),
    }


def part_of(row, expected):
    return {name: row[name] for name in expected}


# --- rows -----------------------------------------------------------------------------------------------------


def test_a_plain_row_is_that_of_the_checkpoint(comparison, model_directory, tmp_path):
    row = comparison.row(Variant("fisher", RATIO))
    keep = comparison.keep(Variant("fisher", RATIO))
    dense, pruned = load_model(model_directory), pruned_model(model_directory, keep, RATIO, tmp_path / "pruned")
    expected = expected_row(dense, pruned, comparison.texts)
    assert part_of(row, expected) == expected
    expected = expected_row(dense, dense, comparison.texts) | {"kl_divergence": pytest.approx(0, abs=1e-6)}
    assert part_of(comparison.dense(), expected) == expected


def test_a_bias_is_that_of_a_model_which_has_one(comparison, model_directory, tmp_path):
    row = comparison.row(Variant("flap", RATIO, "bias"))
    keep = comparison.keep(Variant("flap", RATIO))
    stack = Stack.open(model_directory)
    biases = bias_compensation(stack, keep, input_statistics(stack, comparison.texts.compensation.ids))
    pruned = pruned_model(model_directory, keep, RATIO, tmp_path / "pruned")
    assert all(pruned.get_submodule(name.removesuffix(".bias")).bias is None for name in biases)
    for name, values in biases.items():
        pruned.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(values)
    expected = expected_row(load_model(model_directory), pruned, comparison.texts)
    assert part_of(row, expected) == expected
    plain = comparison.row(Variant("flap", RATIO))
    assert row["parameters"] == plain["parameters"] + sum(values.numel() for values in biases.values())
    assert not np.allclose(row["losses"], plain["losses"], rtol=1e-4)


def test_a_bias_needs_a_linear_layer(comparison, monkeypatch):
    monkeypatch.setattr(judging, "nn", SimpleNamespace(Linear=nn.Embedding))
    with pytest.raises(InputError, match="leave compensation bias out"):
        comparison.row(Variant("random", RATIO, "bias"))


def test_least_squares_is_fitted_on_its_own_text(comparison):
    plain, solved = comparison.row(Variant("random", RATIO)), comparison.row(Variant("random", RATIO, "least_squares"))
    assert solved["parameters"] == plain["parameters"] and solved["achieved_ratio"] == plain["achieved_ratio"]
    given = comparison.texts
    changed = Texts(given.calibration, given.heldout, *2 * (given.evaluation,))
    other = Comparison(comparison.model_directory, changed, round_to=1)
    other = other.row(Variant("random", RATIO, "least_squares"))
    assert other["losses"] != solved["losses"] != plain["losses"]


def test_shortgpt_is_judged_through_its_checkpoint(comparison, model_directory, tmp_path):
    row = comparison.row(Variant(SHORTGPT, 0.5))
    stack = Stack.open(model_directory)
    achieved = write_shortgpt(model_directory, stack, comparison.texts.calibration.ids, 0.5, tmp_path / "short")
    expected = expected_row(load_model(model_directory), load_model(tmp_path / "short"), comparison.texts)
    assert part_of(row, expected) == expected and row["achieved_ratio"] == achieved == 0.5
    assert not list((tmp_path / ".cache/studies").glob(".shortgpt*"))
    with pytest.raises(InputError, match="expected compensation none"):
        comparison.row(Variant(SHORTGPT, 0.5, "bias"))


def test_slicegpt_is_judged_as_it_is_computed(comparison, model_directory):
    row = comparison.row(Variant(SLICEGPT, 0.3))
    stack, given = Stack.open(model_directory), comparison.texts
    size = sliced_size(stack.architecture, dimension_for(stack.architecture, 0.3))
    assert part_of(row, ("achieved_ratio", "parameters", "size")) == {
        "achieved_ratio": size.achieved_ratio,
        "parameters": size.parameters,
        "size": size.statement,
    }
    model = slicegpt(stack, given.compensation.ids, size.dimension)
    logits = slicegpt_hidden_states(stack, model, given.evaluation.ids)[:, :-1] @ stack.head_weight().T
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), given.evaluation.ids[:, 1:], reduction="none")
    assert row["losses"] == pytest.approx(losses.mean(dim=1).tolist(), rel=1e-5)
    assert row["kl_divergence"] > 0.01 and abs(row["achieved_ratio"] - 0.3) < 0.03
    with pytest.raises(InputError, match="expected compensation none"):
        comparison.row(Variant(SLICEGPT, 0.3, "least_squares"))
    with pytest.raises(InputError, match="expected some that remove units, got slicegpt"):
        comparison.keep(Variant(SLICEGPT, 0.3))


def test_a_model_that_cannot_be_sliced_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_family("gemma3_text", tmp_path / "model")
    other = Comparison(tmp_path / "model", texts(), round_to=1)
    with pytest.raises(InputError, match=r"SliceGPT: expected a decoder-only model .* choose another method"):
        measure(other, ("random", SLICEGPT), (RATIO,))
    assert not (tmp_path / ".cache").exists()


def test_the_published_rule_is_another_row(comparison, model_directory):
    exact, published = (comparison.row(Variant("nirvana", RATIO, rule=rule)) for rule in ("exact", "published"))
    assert exact["losses"] != published["losses"]


# --- one budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_every_method_meets_the_budget(name, ratio, comparison):
    assert comparison.row(Variant(name, ratio))["achieved_ratio"] == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize("ranking", ["modules", "joint", "layers"])
def test_protected_layers_stay_whole_in_every_ranking(ranking, tmp_path):
    sites = Stack.open(tiny_llama(tmp_path, num_hidden_layers=4, intermediate_size=256)).architecture.sites()
    generator = np.random.default_rng(0)
    saliency = {site.name: generator.random(site.units, dtype=np.float32) for site in sites}
    method = replace(METHODS["random"], ranking=ranking, protected_layers=(8, 8))  # of 32: one first, one last
    keep = allocate(sites, saliency, method.allocation(0.3, round_to=1))
    left = {site.name: len(keep[site.name]) / site.units for site in sites}
    assert all(share == 1 for name, share in left.items() if name.startswith(("layers.0.", "layers.3.")))
    removed = sum((1 - left[site.name]) * site.weights for site in sites) / sum(site.weights for site in sites)
    assert removed == pytest.approx(0.3, abs=0.005)
    whole = replace(method, protected_layers=(16, 16))
    with pytest.raises(InputError, match="expected layers beside the 4 protected ones"):
        allocate(sites, saliency, whole.allocation(0.3, round_to=1))


# --- what is kept ---------------------------------------------------------------------------------------------


def counted(monkeypatch, name):
    """Count how often a method scores."""
    calls, original = [], METHODS[name].scorer

    def scorer(stack, ids, scoring):
        calls.append(scoring.seed)
        return original(stack, ids, scoring)

    # the wrapper's code would be this test's, which is no part of the project's code
    monkeypatch.setattr(registry, "study_key", lambda parts, code: registry.STUDIES.name + str(hash(str(parts))))
    monkeypatch.setattr(f"nirvana.methods.{name}.{name}", scorer)
    return calls


def test_no_ratio_repeats_a_backward_pass(comparison, monkeypatch):
    calls = counted(monkeypatch, "nirvana")
    rows = measure(comparison, ("nirvana",), (0.2, 0.3, 0.4))
    assert calls == [0] and len(rows) == 1 + 3 * 3
    again = Comparison(comparison.model_directory, comparison.texts, round_to=8)
    again.row(Variant("nirvana", 0.2))
    assert calls == [0]  # another rounding reads the same scores


def test_seeds_count_for_what_is_drawn(comparison):
    rows = measure(comparison, ("random", "magnitude"), (RATIO,), seeds=2)
    rows = [row for row in rows if row["compensation"] == "none"]
    assert [(row["method"], row["seed"]) for row in rows[1:]] == [("random", 0), ("random", 1), ("magnitude", 0)]
    assert rows[1]["losses"] != rows[2]["losses"]


def test_a_killed_study_goes_on_where_it_was(comparison, monkeypatch):
    settings = ("random", SHORTGPT), (0.3, 0.5)
    judged, original = [], Comparison.judged_by

    def dies_at_the_third(self, hidden_of):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(1)
        return original(self, hidden_of)

    monkeypatch.setattr(Comparison, "judged_by", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        measure(comparison, *settings)
    judged.clear()
    monkeypatch.setattr(Comparison, "judged_by", lambda self, of: judged.append(1) or original(self, of))
    again = Comparison(comparison.model_directory, comparison.texts, round_to=1)
    rows = measure(again, *settings)
    assert len(rows) == 1 + 6 + 2 and len(judged) == 9 - 2
    judged.clear()
    last = Comparison(comparison.model_directory, comparison.texts, round_to=1)
    assert measure(last, *settings) == rows and judged == []
    assert "stack" not in vars(last)  # nothing was opened


def test_broken_scores_are_computed_again(comparison, tmp_path):
    keep = comparison.keep(Variant("wanda_sp", RATIO))
    (file,) = (tmp_path / ".cache/studies/compare").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = comparison.keep(Variant("wanda_sp", RATIO))
    assert all(np.array_equal(again[name], keep[name]) for name in keep)


def test_an_unknown_method_is_named_before_anything_runs(comparison):
    with pytest.raises(InputError, match=r"expected some of nirvana, fisher, .*, shortgpt, slicegpt, got 'flop'"):
        measure(comparison, ("random", "flop"), (RATIO,))
    assert "stack" not in vars(comparison)


# --- texts ----------------------------------------------------------------------------------------------------


def written_ids(directory, **changed):
    for number, name in enumerate(("calibration", "calibration_extra", "heldout", "evaluation")):
        write_json(directory / f"{name}_ids.json", changed.get(name, random_ids(4, 8, number).tolist()))
    return directory


def test_texts_of_ids(tmp_path):
    found = texts_of_ids(written_ids(tmp_path), tokens=27, compensation_sequences=6)
    assert [list(getattr(found, each.name).ids.shape) for each in fields(found)] == [[4, 8], [6, 8], [4, 8], [3, 8]]
    given = torch.cat([random_ids(4, 8), random_ids(4, 8, 1)])
    assert torch.equal(found.calibration.ids, given[:4])
    assert torch.equal(found.compensation.ids, given[:6])
    whole = texts_of_ids(tmp_path)
    assert len(whole.compensation.ids) == 8 and len(whole.evaluation.ids) == 4
    assert whole.calibration.digest == found.calibration.digest
    assert len({getattr(whole, each.name).digest for each in fields(whole)}) == 4


@pytest.mark.parametrize("odd", [[], {"a": 1}, [[1, 2], [3]], [[1, True]], [[]], ["text"]])
def test_odd_ids_are_refused(odd, tmp_path):
    with pytest.raises(InputError, match=r"heldout_ids.json: expected a list of equally long lists"):
        texts_of_ids(written_ids(tmp_path, heldout=odd))


def test_too_few_ids_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected 9 sequences of 8 tokens for compensation, got 8"):
        texts_of_ids(written_ids(tmp_path), compensation_sequences=9)
    with pytest.raises(InputError, match="expected 5 sequences of 8 tokens for evaluation, got 4"):
        texts_of_ids(tmp_path, tokens=40)


def pipeline_of(directory):
    """Write a corpus as the pipeline has it; return its splits, where it is and what is asked of a draw."""
    speeches = sorted(tiny_corpus(directory / "speeches").iterdir())
    documents = [Document(file.name, file.read_text()) for file in speeches]
    splits = sample_pool.split_documents(documents)
    corpus = directory / "corpus"
    corpus.mkdir()
    write_documents(corpus / "documents.jsonl", documents)
    asked = SimpleNamespace(add_bos=False, seed=0, pool_size=5, sequences=8, sequence_length=16, repeated=1.0)
    asked.heldout_sequences, asked.heldout_length = 3, 16
    return splits, corpus, SimpleNamespace(calibration=asked, compensation=SimpleNamespace(sequence_length=16))


def test_texts_of_the_pipeline(model_directory, tmp_path):
    splits, corpus, params = pipeline_of(tmp_path)
    found = texts_of_pipeline(params, model_directory, corpus, tokens=300, compensation_sequences=5)
    names = ("pool_size", "sequences", "sequence_length")
    encoder = sample_pool.Encoder.of_model(model_directory, add_bos=False)
    size = {"batches": 5, "sequences": 8, "length": 16, "order": "calibration 0", "names": names}
    pool = sample_pool.draw(splits["calibration"], encoder, **size)
    # as it was written, whatever the pipeline makes of it
    assert torch.equal(found.calibration.ids, torch.from_numpy(pool.input_ids).flatten(0, 1)[:32])
    heldout = sample_pool.draw_heldout(params.calibration, splits["heldout"], encoder)
    assert torch.equal(found.heldout.ids, torch.from_numpy(heldout.input_ids[0]))
    assert found.evaluation.ids.shape == (3, 128) and (found.evaluation.ids[:, 0] == 0).all()  # BOS
    read = {d.id: encoder(d).tolist() for d in read_documents(corpus / "documents.jsonl")}
    windows = [str(row.tolist())[1:-1] for row in found.compensation.ids]
    owners = [[name for name, ids in read.items() if window in str(ids)] for window in windows]
    assert len(owners) == 5
    allowed = {document.id for document in splits["calibration"]}
    assert all(allowed & set(each) for each in owners)


def test_another_model_reads_every_text_by_its_own_tokenizer(model_directory, tmp_path):
    """Its vocabulary is the other way round, so no token id means the same."""
    _, corpus, params = pipeline_of(tmp_path)
    other = shutil.copytree(model_directory, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {text: 513 - id if id > 1 else id for text, id in ids.items()}
    write_json(other / "tokenizer.json", tokenizer)
    first, second = (texts_of_pipeline(params, each, corpus, 300, 5) for each in (model_directory, other))
    for each in fields(first):
        of_first, of_second = (getattr(texts, each.name).ids for texts in (first, second))
        assert torch.equal(torch.where(of_first > 1, 513 - of_first, of_first), of_second)


def test_a_model_with_an_encoder_has_no_texts(tmp_path):
    _, corpus, params = pipeline_of(tmp_path)
    with pytest.raises(InputError, match="expected a decoder-only model, got an encoder-decoder"):
        texts_of_pipeline(params, tiny_t5(tmp_path / "t5"), corpus, 300, 5)


def test_text_that_the_model_writes_is_mixed_in_and_kept(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = texts_of_ids(written_ids(tmp_path), compensation_sequences=4)
    assert with_generated(plain, model_directory, 0) is plain
    found = with_generated(plain, model_directory, 2)
    assert all(getattr(found, name) is getattr(plain, name) for name in ("calibration", "heldout", "evaluation"))
    rows = found.compensation.ids
    written = written_by(model_directory, 2, 8, 0, False, torch.device("cpu"))
    # four of one kind at 1/8, 3/8, 5/8, 7/8; two of the other at 1/4, 3/4
    assert torch.equal(rows[[0, 2, 3, 5]], plain.compensation.ids) and torch.equal(rows[[1, 4]], written)
    monkeypatch.setattr("studies.texts.written_by", None)  # asked twice, computed once
    assert with_generated(plain, model_directory, 2).compensation.digest == found.compensation.digest


def test_another_text_to_judge_on(model_directory, tmp_path):
    texts = texts_of_ids(written_ids(tmp_path))
    write_json(tmp_path / "other.json", random_ids(6, 16, 9).tolist())
    found = judged_on(texts, tmp_path / "other.json", model_directory, tokens=40)
    assert torch.equal(found.evaluation.ids, random_ids(6, 16, 9)[:2])
    assert all(getattr(found, name) is getattr(texts, name) for name in ("calibration", "compensation", "heldout"))
    speech = next(tiny_corpus(tmp_path / "speeches").iterdir())
    found = judged_on(texts, speech, model_directory, tokens=200)
    assert found.evaluation.ids.shape == (2, 128) and found.compensation is texts.compensation
    tokenizer = load_tokenizer(model_directory)
    assert tokenizer.decode(found.evaluation.ids[0], skip_special_tokens=True)[:40] in speech.read_text()
    with pytest.raises(InputError, match=r"--judge: .*none.txt does not exist"):
        judged_on(texts, tmp_path / "none.txt", model_directory, tokens=200)
    with pytest.raises(InputError, match=r"expected 7 sequences of 16 tokens for evaluation, got 6"):
        judged_on(texts, tmp_path / "other.json", model_directory, tokens=7 * 16)


# --- the bars -------------------------------------------------------------------------------------------------


def test_quality_measures_both_and_holds_them_against_the_limits(model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = written_ids(tmp_path / "ids")
    found = {each.name: each for each in quality.measure(model_directory, ids, {0.3: 0.9})}
    ours, published = (found[f"ratio 0.3: perplexity, {name}"].value for name in ("ours", "published"))
    bar = found["ratio 0.3: perplexity, ours / published"]
    assert bar.value == pytest.approx(ours / published) and bar.limit == 0.9
    assert bar.as_dict()["holds"] == (bar.value <= 0.9)
    texts = with_generated(texts_of_ids(ids), model_directory, 96)  # as preset best has them
    comparison = Comparison(model_directory, texts, ridge=0.3)
    row = comparison.row(Variant("fisher", 0.3, "least_squares"))
    assert ours == pytest.approx(math.exp(np.mean(row["losses"])))
    keep = comparison.keep(Variant("nirvana", 0.3, rule="published"))
    hidden = final_hidden_states(comparison.stack, comparison.texts.evaluation.ids, keep)
    logits = hidden[:, :-1] @ comparison.stack.head_weight().T
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), comparison.texts.evaluation.ids[:, 1:].flatten())
    assert published == pytest.approx(float(loss.exp()), rel=1e-4)


def test_quality_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--ids DIRECTORY"):
        quality.main()


def test_a_source_that_is_edited_while_a_study_runs_counts_as_it_began(tmp_path, monkeypatch):
    for package in ("nirvana", "tasks"):
        (tmp_path / package).mkdir()
    module, imported = tmp_path / "tasks/study.py", tmp_path / "nirvana/scores.py"
    module.write_text("from nirvana.scores import score\n")
    imported.write_text("score = 1\n")

    def started():
        store.source_digest.cache_clear()
        monkeypatch.setattr(store, "_AT_START", store.sources(tmp_path))

    monkeypatch.setattr(store, "_ROOT", tmp_path)
    started()
    first = store.source_digest(module)
    imported.write_text("score = 2\n")
    store.source_digest.cache_clear()  # as if it were asked for the first time
    assert store.source_digest(module) == first
    started()
    second = store.source_digest(module)
    store.source_digest.cache_clear()
    assert second != first


def test_what_is_only_said_of_code_voids_no_result():
    plain = b"class A:\n    x = 1\n    def f(self):\n        return 'text'\n"
    explained = b'''"""A module."""
class A:
    """A class."""
    x = 1
    """A number."""
    def f(self):  # a function
        """Return text."""
        return "text"
'''
    assert store.code_digest(plain) == store.code_digest(explained)
    for old, new in ((b"x = 1", b"x = 2"), (b"'text'", b"'other'"), (b"return 'text'", b"pass"), (b"self", b"this")):
        assert store.code_digest(plain.replace(old, new)) != store.code_digest(plain)
