"""Saliency by naive code that holds every gradient and all logits: an independent reference."""

from tiny import logits_of

from nirvana.loading import load_model


def naive_objective(logits):
    """f = 1/(B·V) · Σ_b Σ_v max_t z[b,t,v], from full logits."""
    batch, _, vocab = logits.shape
    return logits.max(dim=1).values.sum() / (batch * vocab)


def naive_saliency(path, ids):
    """|W · ∂f/∂W| of every parameter from one ordinary backward pass."""
    model = load_model(path)
    objective = naive_objective(logits_of(model, ids))
    objective.backward()
    saliency = {n: (p * p.grad).abs().detach() for n, p in model.named_parameters() if p.grad is not None}
    return objective.item(), by_expert(saliency)


def by_expert(saliency):
    """Name the parts of fused expert matrices as the checkpoint does."""
    result = {}
    for name, values in saliency.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(values):
                gate, up = both.chunk(2)
                prefix = name.replace("gate_up_proj", str(expert))
                result |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            result |= {f"{prefix}{expert}.down_proj.weight": down for expert, down in enumerate(values)}
        else:
            result[name] = values
    return result
