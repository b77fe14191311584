"""SliceGPT: principal components by hand, nothing sliced is the dense model, slicing is projecting in transformers."""

import math

import pytest
import torch
from tiny import all_families, ids_for, model_type_of, one_layout_each, random_ids, save_family, tiny_llama

from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.methods.slicegpt import (
    SlicedModel,
    _Branch,
    principal_components,
    slicegpt,
    slicegpt_hidden_states,
)
from nirvana.methods.slicegpt_size import BRANCHES, check_can_be_sliced, dimension_for, sliced_size, stream_matrices
from nirvana.walk import Stack, final_hidden_states

REFUSED = {"gemma3_text", "qwen3_moe", "t5"}
SUPPORTED = [name for name in all_families() if model_type_of(name) not in REFUSED]

# -- principal components ----------------------------------------------------------------------------------------------


def test_two_dimensions_by_hand():
    """(1, 3) and (3, 1): Σ xᵀx is [[10, 6], [6, 10]], 16 along (1, 1) and 4 across."""
    values, directions = principal_components([torch.tensor([[[1.0, 3.0], [3.0, 1.0]]]), torch.zeros(1, 1, 2)])
    assert values.tolist() == pytest.approx([16, 4])
    assert directions.abs().flatten().tolist() == pytest.approx([math.sqrt(0.5)] * 4)
    assert directions[0, 0] * directions[1, 0] > 0 > directions[0, 1] * directions[1, 1]


def test_the_mean_is_not_taken_away():
    values, directions = principal_components([torch.tensor([[3.0, 4.0], [3.0, 4.0]])])
    assert values.tolist() == pytest.approx([50, 0], abs=1e-9)
    assert directions[:, 0].abs().tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_what_a_slice_loses_is_the_deleted_eigenvalues(kept):
    generator = torch.Generator().manual_seed(0)
    signals = [torch.randn(3, 20, 7, generator=generator) @ torch.randn(7, 7, generator=generator) for _ in range(2)]
    values, directions = principal_components(signals)
    basis = directions[:, :kept]
    lost = sum(float((x.double() - x.double() @ basis @ basis.T).square().sum()) for x in signals)
    assert lost == pytest.approx(float(values[kept:].sum()), rel=1e-6, abs=1e-6)
    # no other basis of as many directions loses less
    other = torch.linalg.qr(torch.randn(7, kept, generator=generator, dtype=torch.float64)).Q
    assert sum(float((x.double() - x.double() @ other @ other.T).square().sum()) for x in signals) >= lost - 1e-6


def test_activations_that_overflow_are_one_clear_line():
    with pytest.raises(InputError, match="expected finite activations"):
        principal_components([torch.tensor([[1.0, math.inf]])])


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
def test_nothing_sliced_is_the_dense_model(name, tmp_path):
    stack, ids = Stack.open(save_family(name, tmp_path)), ids_for(name, 5, 12)
    model = slicegpt(stack, ids, stack.architecture.hidden_size)
    other = ids_for(name, 3, 9, seed=1)
    hidden, expected = slicegpt_hidden_states(stack, model, other), final_hidden_states(stack, other)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert len(model.rotations) == 2 * stack.num_layers
    identity = torch.eye(stack.architecture.hidden_size)
    assert all(torch.allclose(each.T @ each, identity, atol=1e-5) for each in model.rotations)


class Projected:
    """A model of transformers whose residual stream is projected in place, in its own basis."""

    def __init__(self, directory, dimension):
        self.model, self.dimension, self.projections = load_model(directory), dimension, []
        self.scale = getattr(self.model.config, "residual_multiplier", 1.0)
        self.last = self.model.config.num_hidden_layers - 1
        for number, layer in enumerate(self.model.model.layers):
            layer.forward = lambda *a, n=number, m=layer, **k: self._layer(n, m, *a, **k)

    def _layer(self, number, layer, hidden, **arguments):
        if number == 0:
            hidden = self._project(0, hidden)
        written = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)[0]
        hidden = self._project(2 * number + 1, hidden + self.scale * written)
        hidden = hidden + self.scale * layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden if number == self.last else self._project(2 * number + 2, hidden)

    def _project(self, place, hidden):
        if place == len(self.projections):  # the first text that comes along is the calibration
            basis = torch.linalg.svd(hidden.flatten(0, 1).double(), full_matrices=False).Vh[: self.dimension]
            self.projections.append((basis.T @ basis).float())
        return hidden @ self.projections[place]

    @torch.no_grad()
    def logits(self, ids):
        return self.model(ids).logits


@pytest.mark.parametrize("name", [name for name in one_layout_each() if model_type_of(name) not in REFUSED])
def test_slicing_is_projecting(name, tmp_path):
    stack, dimension = Stack.open(save_family(name, tmp_path)), 20
    calibration, ids = random_ids(6, 16), random_ids(3, 9, seed=1)
    reference = Projected(tmp_path, dimension)
    reference.logits(calibration)
    expected = reference.logits(ids)
    model = slicegpt(stack, calibration, dimension)
    logits = slicegpt_hidden_states(stack, model, ids) @ stack.head_weight().T
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    dense = final_hidden_states(stack, ids) @ stack.head_weight().T
    assert float((logits - dense).abs().max()) > 0.05 * float(expected.abs().max())


def test_microbatches_change_nothing(tmp_path, monkeypatch):
    stack, ids = Stack.open(tiny_llama(tmp_path)), random_ids(6, 16)
    whole = slicegpt_hidden_states(stack, slicegpt(stack, ids, 20), ids)
    monkeypatch.setattr("nirvana.walk.FORWARD_TOKENS", 32)
    parts = slicegpt_hidden_states(stack, slicegpt(stack, ids, 20), ids)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


def test_streamed_is_resident(tmp_path):
    tiny_llama(tmp_path)
    ids, results = random_ids(4, 16), []
    for execution in ("resident", "streamed"):
        stack = Stack.open(tmp_path, execution=execution)
        results.append(slicegpt_hidden_states(stack, slicegpt(stack, ids, 20), ids))
    assert torch.equal(*results)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_by_hand(tmp_path):
    """A layer has 288 rows and columns as long as the stream is wide: 96 of attention, 192 of the MLP."""
    architecture = Stack.open(tiny_llama(tmp_path)).architecture
    size = sliced_size(architecture, 24)
    reads, writes = (32 + 16 + 16) + 2 * 64, 32 + 64
    assert size.dense_block_weights == 2 * (reads + writes) * 32
    # the last MLP writes to the whole stream
    assert size.block_weights == 2 * (reads + writes) * 24 + 64 * (32 - 24)
    assert size.shortcut_weights == 3 * 24 * 24 + 24 * 32
    assert size.parameters == size.block_weights + size.shortcut_weights + 512 * 24 + 512 * 32
    assert size.slicing_fraction == 0.25
    assert size.achieved_ratio == pytest.approx(1 - (size.block_weights + size.shortcut_weights) / (2 * 288 * 32))
    assert size.statement.startswith("24 of 32 dimensions; block weights with 2,496 of shortcut matrices 8.68 % below")


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_counted_is_what_the_walk_multiplies_by(name, tmp_path):
    stack, dimension = Stack.open(save_family(name, tmp_path)), 20
    architecture, rotation = stack.architecture, torch.eye(32)[:, :dimension]
    blocks, shortcuts, others = 0, 0, 0
    for layer in range(stack.num_layers):
        for place in BRANCHES:
            leaving = None if (layer, place) == (stack.num_layers - 1, BRANCHES[-1]) else rotation
            weights = stack.layer_weights(layer)
            branch = _Branch(stack, layer, weights, stream_matrices(architecture), place, rotation, leaving)
            counts = [each.numel() for each in branch.parameters.values() if each.ndim > 1]
            blocks, shortcuts = blocks + sum(counts), shortcuts + branch.shortcut.numel()
            others += sum(each.numel() for each in branch.parameters.values() if each.ndim == 1)
    size = sliced_size(architecture, dimension)
    assert (size.block_weights, size.shortcut_weights) == (blocks, shortcuts)
    assert size.parameters == blocks + shortcuts + others + 512 * dimension + 512 * 32


@pytest.mark.parametrize("name", ["llama", "qwen3-biases", "granite-biases"])
def test_the_dimension_comes_nearest_to_the_ratio(name, tmp_path):
    architecture = Stack.open(save_family(name, tmp_path)).architecture
    achieved = [sliced_size(architecture, each).achieved_ratio for each in range(1, 33)]
    for ratio in (0.0, 0.2, 0.5, 0.99):
        distances = [abs(each - ratio) for each in achieved]
        assert dimension_for(architecture, ratio) == distances.index(min(distances)) + 1


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in all_families() if model_type_of(name) in REFUSED])
def test_other_families_are_one_clear_line(name, tmp_path):
    stack = Stack.open(save_family(name, tmp_path))
    with pytest.raises(InputError, match=r"^SliceGPT: expected a decoder-only model .*; choose another method$") as hit:
        slicegpt(stack, ids_for(name, 2, 8), 16)
    assert model_type_of(name) in str(hit.value)
    with pytest.raises(InputError, match="choose another method"):
        check_can_be_sliced(stack.architecture)


def test_numbers_that_cannot_be_are_one_clear_line(tmp_path):
    stack = Stack.open(tiny_llama(tmp_path))
    for dimension in (0, 33):
        with pytest.raises(InputError, match=f"expected a dimension of 1 to 32, got {dimension}"):
            slicegpt(stack, random_ids(2, 8), dimension)
    for ratio in (-0.1, 1.0):
        with pytest.raises(InputError, match="expected 0 <= ratio < 1"):
            dimension_for(stack.architecture, ratio)
    model = SlicedModel((torch.eye(32),) * 4)
    with pytest.raises(InputError, match="vocabulary size"):
        slicegpt_hidden_states(stack, model, torch.full((1, 4), 512))
