"""Mask Fisher against hand-computed gradients, against naive masks in the whole model, and against what it predicts."""

import numpy as np
import pytest
import torch
from tiny import all_families, ids_for, logits_of, random_ids, save_family

from nirvana.divergence import kl_divergence
from nirvana.errors import InputError
from nirvana.fisher import label_uniforms, mask_fisher
from nirvana.head import sampled_label_gradients
from nirvana.loading import load_model
from nirvana.projections import output_projections
from nirvana.walk import Stack, final_hidden_states

WITH_PROJECTIONS = [name for name in all_families() if name != "qwen3_moe"]


def sampled_label_gradient(hidden, head, uniforms, softcap=None):
    (gradient,) = sampled_label_gradients(hidden, head, uniforms[None], softcap)
    return gradient


def test_label_gradient_by_hand():
    """Logits (ln 2, 0, 0): P = (1/2, 1/4, 1/4). 0.6 falls on the second label: dz = (1/2, −3/4, 1/4)."""
    head = torch.tensor([[2.0], [1.0], [1.0]]).log()
    gradient = sampled_label_gradient(torch.ones(1, 1, 1), head, torch.tensor([[0.6]]))
    assert gradient.item() == pytest.approx(0.5 * np.log(2))
    first = sampled_label_gradient(torch.ones(1, 1, 1), head, torch.tensor([[0.49]]))
    assert first.item() == pytest.approx(-0.5 * np.log(2))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunks_of_the_vocabulary_do_not_matter(softcap, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 5, 4, generator=generator), torch.randn(37, 4, generator=generator)
    numbers = torch.rand(2, 5, generator=generator)
    whole = sampled_label_gradient(hidden, head, numbers, softcap)
    for chunk in (1, 10, 36):
        monkeypatch.setattr("nirvana.head.VOCAB_CHUNK", chunk)
        torch.testing.assert_close(sampled_label_gradient(hidden, head, numbers, softcap), whole)


def test_labels_follow_the_distribution():
    head = torch.tensor([[0.1], [0.2], [0.7]]).log()
    hidden = torch.ones(1, 4000, 1)
    numbers = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    # with head rows as logits the gradient is Σ p·z − z_label: the label can be read off it
    mean = (torch.tensor([0.1, 0.2, 0.7]) * head[:, 0]).sum()
    labels = (mean - sampled_label_gradient(hidden, head, numbers).flatten()).exp()
    for share in (0.1, 0.2, 0.7):
        assert ((labels - share).abs() < 1e-4).float().mean() == pytest.approx(share, abs=0.03)


def test_numbers_of_the_draws():
    """Each in [0, 1) and uniform; those of a position evenly spaced; a sequence's own whatever else is asked for."""
    found = label_uniforms(4000, 7, 3, 4)
    assert found.shape == (4, 4000) and found.min() >= 0 and found.max() < 1
    torch.testing.assert_close(found.sort(dim=0).values.diff(dim=0), torch.full((3, 4000), 0.25, dtype=torch.float64))
    for draw in found:
        assert torch.histc(draw, 4, 0, 1).tolist() == pytest.approx([1000] * 4, abs=120)
    assert torch.equal(found[0], label_uniforms(4000, 7, 3, 1)[0])
    assert not torch.equal(found[0], label_uniforms(4000, 7, 4, 1)[0])
    assert not torch.equal(found[0], label_uniforms(4000, 8, 3, 1)[0])


def test_draws_together_have_labels_as_often_as_they_are_likely():
    """P = (1/4, 3/4), four draws: the first label exactly once at every position."""
    head = torch.tensor([[1.0], [3.0]]).log()
    numbers = label_uniforms(50, 0, 0, 4)[:, None]
    gradients = sampled_label_gradients(torch.ones(1, 50, 1), head, numbers)
    torch.testing.assert_close(gradients.mean(dim=0), torch.zeros(1, 50, 1))
    is_first = (gradients - 0.75 * np.log(3)).abs() < 1e-5  # P·z − z₁, of z = (0, ln 3)
    assert is_first.sum(dim=0).eq(1).all()


def naive_fisher(path, ids, draws, seed, kind):
    """Masks as parameters, multiplied in by hooks; labels by the cumulative distribution of full logits."""
    model, stack = load_model(path), Stack.open(path)
    projections = [p for of_layer in output_projections(stack.architecture).values() for p in of_layer]
    masks = {}

    def mask(name, units):
        def hook(module, arguments):
            (x,) = arguments
            masks[name] = torch.ones(len(x), x.shape[1] if kind == "tokens" else 1, units, requires_grad=True)
            return (x * masks[name].repeat_interleave(x.shape[-1] // units, dim=2),)

        return hook

    for projection in projections:
        module = model.get_submodule(projection.name.removesuffix(".weight"))
        module.register_forward_pre_hook(mask(projection.site.name, projection.site.units))
    total = {p.site.name: torch.zeros(p.site.units) for p in projections}
    sequences, positions = (ids[-1] if isinstance(ids, tuple) else ids).shape
    uniforms = [label_uniforms(positions, seed, sequence, draws) for sequence in range(sequences)]
    for numbers in torch.stack(uniforms, dim=1):
        logits = logits_of(model, ids)
        probabilities = logits.detach().double().softmax(dim=-1)
        labels = (probabilities.cumsum(dim=-1) <= numbers[..., None]).sum(dim=-1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        for name, values in masks.items():
            total[name] += values.grad.square().sum(dim=(0, 1))
    return {name: values / (2 * draws * sequences * positions) for name, values in total.items()}


@pytest.mark.parametrize("masks", ["tokens", "sequences"])
@pytest.mark.parametrize("name", WITH_PROJECTIONS)
def test_equals_naive_masks(name, masks, tmp_path):
    stack, ids = Stack.open(save_family(name, tmp_path)), ids_for(name, 3, 10)
    found = mask_fisher(stack, ids, microbatch=2, draws=2, seed=5, masks=masks)
    expected = naive_fisher(tmp_path, ids, 2, 5, masks)
    assert found.keys() == expected.keys()
    for key, vector in expected.items():
        torch.testing.assert_close(found[key], vector, rtol=2e-3, atol=1e-6 * float(vector.max()))


def test_microbatch_and_execution_change_nothing(tmp_path):
    path = save_family("llama", tmp_path)
    ids = random_ids(5, 9)
    whole = mask_fisher(Stack.open(path), ids, microbatch=5)
    for stack in (Stack.open(path), Stack.open(path, execution="streamed")):
        for name, vector in mask_fisher(stack, ids, microbatch=2).items():
            torch.testing.assert_close(vector, whole[name], rtol=1e-4, atol=1e-7 * float(whole[name].max()))


def test_seed_draws_other_labels(tmp_path):
    stack, ids = Stack.open(save_family("llama", tmp_path)), random_ids(2, 9)
    one, same, other = (mask_fisher(stack, ids, seed=seed)["layers.0.mlp_neuron"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_predicts_what_leaving_costs(tmp_path):
    """½ F_u against the KL of the model without u, both in nats a token: same size, same order."""
    stack, ids = Stack.open(save_family("llama", tmp_path)), random_ids(16, 24)
    dense = final_hidden_states(stack, ids)
    sites = stack.architecture.sites()
    whole = {site.name: np.arange(site.units) for site in sites}
    predicted, measured = [], []
    fisher = mask_fisher(stack, ids, microbatch=8, draws=16, masks="sequences")
    for site in sites:
        if site.module == "mlp":
            for unit in range(0, site.units, 4):
                keep = whole | {site.name: np.delete(whole[site.name], unit)}
                predicted.append(float(fisher[site.name][unit]))
                measured.append(kl_divergence(stack, keep, ids, dense))
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    assert np.corrcoef(ranks)[0, 1] > 0.9  # Spearman's
    assert 0.5 < np.median(np.array(measured) / np.array(predicted)) < 2


def test_fused_experts_are_refused(tmp_path):
    stack = Stack.open(save_family("qwen3_moe", tmp_path))
    with pytest.raises(InputError, match=r"mlp_neuron: expected an output projection .* use saliency\.method nirvana"):
        mask_fisher(stack, random_ids(2, 9))
