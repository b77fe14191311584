"""What the step says of experts that the calibration has not shown."""

import logging

import numpy as np
import torch
from tiny import family_configs, random_ids, random_keep, save_family

from nirvana.allocation import Allocation
from nirvana.architectures.registry import architecture_for
from nirvana.plan import Plan
from nirvana.saliency import channel_saliency, idle_experts, unit_saliency
from nirvana.walk import Stack
from tasks import allocate


def test_experts_without_a_token_are_counted_as_the_router_sends_tokens(tmp_path, caplog):
    """64 experts, two a token, 6 tokens: at most 12 are met; which, the router's own scores say."""
    model = save_family("qwen3_moe", tmp_path, num_local_experts=64, mlp_only_layers=[0, 1])
    stack, ids = Stack.open(model), random_ids(1, 6)
    saliency = {
        name: values.numpy()
        for name, values in unit_saliency(stack.architecture.sites(), channel_saliency(stack, ids).sums).items()
    }
    idle = idle_experts(stack.architecture.sites(), saliency)
    assert idle == [f"layers.2.experts.{expert}.mlp_neuron" for expert in unmet_experts(model, ids)]
    assert 64 - 12 <= len(idle) < 64
    with caplog.at_level(logging.WARNING):
        table = allocate._warn_of_idle_experts(stack.architecture.sites(), saliency)
    assert table.to_dict("records") == [{"layer": 2, "module": "mlp", "experts": 64, "idle_experts": len(idle)}]
    assert f"{len(idle)} of 64 experts met no token" in caplog.text
    assert "raise calibration.sequences or calibration.sequence_length" in caplog.text


def unmet_experts(model, ids):
    from nirvana.loading import load_model

    loaded, met = load_model(model), set()
    gate = loaded.model.layers[2].mlp.gate
    gate.register_forward_hook(lambda module, inputs, output: met.update(output[-1].flatten().tolist()))
    with torch.no_grad():
        loaded(ids)
    return sorted(set(range(64)) - met)


def test_the_table_counts_them_beside_the_kept_units(caplog):
    sites = architecture_for(family_configs()["qwen3_moe"]).sites()  # the middle layer has no experts
    saliency = {site.name: np.ones(site.units, np.float32) for site in sites}
    saliency["layers.0.experts.1.mlp_neuron"][:] = 0
    plan = Plan.build(
        sites, random_keep(sites), model_digest="sha256:0", model_type="qwen3_moe", calibration_digest="sha256:0",
        allocation=Allocation(0.4),
    )  # fmt: skip
    table = allocate._by_layer(plan, allocate._warn_of_idle_experts(sites, saliency))
    counted = table[["layer", "module", "experts", "idle_experts"]].values.tolist()
    assert counted == [
        [0, "attention", 0, 0],
        [0, "mlp", 4, 1],
        [1, "attention", 0, 0],
        [1, "mlp", 0, 0],
        [2, "attention", 0, 0],
        [2, "mlp", 4, 0],
    ]


def test_a_model_without_experts_has_no_such_column(caplog):
    sites = architecture_for(family_configs()["llama"]).sites()
    saliency = {site.name: np.zeros(site.units, np.float32) for site in sites}
    assert allocate._warn_of_idle_experts(sites, saliency) is None
    assert not caplog.records
