"""The peak memory of each step: what its walk holds at once, added up.

Memory is what a process really occupies (`nirvana.device`): weights that are memory-mapped from float32 files
are the kernel's to drop and do not count. Constants were measured, see docs/benchmarks.md.
"""

import math

from nirvana.estimate.sizes import ModelSizes, Workload
from nirvana.walk import FORWARD_TOKENS, SEQUENCES_AT_ONCE, Execution, Memory

BASE_BYTES = 300_000_000
"""A process that has imported torch and transformers and opened a model."""
HARNESS_BYTES = 200_000_000
"""What lm-eval and datasets add."""
HARNESS_TOKENS = 64
"""Tokens of a usual lm-eval item, whose logits it holds."""
ARENA_BYTES = 30_000_000
"""What the allocator and the threads of the kernels keep."""
SCORING_ARENA_BYTES = 230_000_000
"""The same, where tensors of ever other sizes are made and freed: measured between 60 and 340 MB."""
HEAD_ROWS = 4096
"""Of the head at a time, as `nirvana.fisher` reads it."""
LOGIT_COPIES = 4
"""Of sequences · vocabulary at once: logits, those of allowed tokens, their probabilities, what a draw takes."""
MICROBATCH_TOKENS = 256
"""Of a forward of `nirvana.recovery`."""
ADAPTER_LIBRARY_BYTES = 100_000_000
"""What peft adds."""
ADAPTER_COPIES = 5
"""An adapter's values, gradient and AdamW's two moments, and one more while it steps."""
LOGIT_BLOCKS = 9
"""Of positions · vocabulary at once: logits and log-probabilities of both models, their products, gradients."""


def _mapped(sizes: ModelSizes, on_cpu: bool) -> bool:
    """Tell whether weights are used as they lie in the file's pages, by the walk and by transformers."""
    return sizes.stored_bytes == 4 and on_cpu


def _weights_in_memory(sizes: ModelSizes, execution: Execution, on_cpu: bool) -> int:
    if _mapped(sizes, on_cpu):
        return 0
    return 4 * (sizes.block_weights if execution == "resident" else 2 * sizes.largest_layer)


def _saved(sizes: ModelSizes) -> int:
    """Return what autograd keeps of a token in a layer: measured."""
    return 4 * (11 * sizes.hidden + 4 * sizes.neurons)


def saliency_bytes(sizes: ModelSizes, work: Workload, execution: Execution, memory: Memory, on_cpu: bool = True) -> int:
    """Return the peak of one candidate's backward walk in one process."""
    tokens, at_once = work.sequences * work.sequence_length, work.microbatch * work.sequence_length
    states = 4 * sizes.hidden * sizes.streams * tokens
    kept = (sizes.layers + 2) * states
    graph = _saved(sizes) * (tokens * sizes.layers if memory == "fast" else at_once)
    # one layer's, and what their products and the kernels take besides, measured
    gradients = 4 * (sizes.largest_layer + 3 * sizes.largest_layer_tensor)
    # the fused copy and its gradient; fast keeps the copies of all layers
    fused = 4 * sizes.largest_fused * (1 + (sizes.layers if memory == "fast" else 1))
    return BASE_BYTES + ARENA_BYTES + _weights_in_memory(sizes, execution, on_cpu) + kept + graph + gradients + fused


def fisher_bytes(sizes: ModelSizes, work: Workload, execution: Execution, on_cpu: bool = True) -> int:
    """Return the peak of one candidate's mask Fisher in one process: no gradient of a weight is ever there."""
    tokens, at_once = work.sequences * work.sequence_length, work.microbatch * work.sequence_length
    # what enters each layer, what leaves the last one, and the gradient of each draw
    kept = (sizes.layers + 1 + work.draws) * 4 * sizes.hidden * sizes.streams * tokens
    # logits and probabilities of a sequence, partly in float64, and rows of the head; before the first layer's graph
    labels = work.sequence_length * HEAD_ROWS * 33 + 4 * HEAD_ROWS * sizes.hidden
    graph = max(_saved(sizes) * at_once, labels)
    return BASE_BYTES + ARENA_BYTES + _weights_in_memory(sizes, execution, on_cpu) + kept + graph


def divergence_bytes(sizes: ModelSizes, work: Workload, execution: Execution, on_cpu: bool = True) -> int:
    """Return the peak of scoring one plan in one process."""
    tokens = work.heldout_sequences * work.heldout_length
    at_once = min(tokens, max(FORWARD_TOKENS, work.heldout_length))
    states = 4 * sizes.hidden * (3 * sizes.streams + 1) * tokens
    passing = 4 * (6 * sizes.hidden + 4 * sizes.neurons) * at_once
    copied = execution == "streamed" and not _mapped(sizes, on_cpu)
    # the sliced layer takes the place of a copied one tensor by tensor, else it stands beside it
    sliced = 4 * sizes.largest_layer_tensor if copied else int(4 * sizes.largest_layer * (1 - work.pruning_ratio))
    fixed = BASE_BYTES + SCORING_ARENA_BYTES + 4 * sizes.largest_fused
    return fixed + _weights_in_memory(sizes, execution, on_cpu) + states + passing + sliced


def self_generation_bytes(sizes: ModelSizes, work: Workload, on_cpu: bool = True) -> int:
    """Return the peak of the dense model writing text: the whole model, keys and values, logits of one step."""
    rows = min(work.self_generated, SEQUENCES_AT_ONCE)
    weights = 0 if _mapped(sizes, on_cpu) else 4 * sizes.weights
    cache = 4 * sizes.kv_width * rows * work.compensation_length
    logits = 4 * LOGIT_COPIES * rows * sizes.vocabulary
    return BASE_BYTES + SCORING_ARENA_BYTES + weights + cache + logits


def fitted_sequences(sizes: ModelSizes, work: Workload) -> int:
    """Return how many sequences compensation is fitted on, those of the model's own included."""
    return work.compensation_sequences + (work.self_generated if sizes.streams == 1 else 0)


def compensation_bytes(sizes: ModelSizes, work: Workload, execution: Execution, on_cpu: bool = True) -> int:
    """Return the peak of solving for the output projections in one process, in a layer that keeps all its units."""
    tokens = fitted_sequences(sizes, work) * work.compensation_length
    at_once = min(tokens, max(FORWARD_TOKENS, work.compensation_length))
    # both streams before and behind the layer, what either projection writes, what is lacking, the target; what enters
    states = 4 * ((4 + 4 * sizes.streams) * sizes.hidden + sizes.projection_columns) * tokens
    passing = 4 * (6 * sizes.hidden + 4 * sizes.neurons) * at_once
    columns = sizes.projection_columns
    solving = 8 * (2 * columns**2 + 3 * columns * sizes.hidden)  # float64: the Gram matrix and its factors; both sides
    sliced = int(4 * sizes.largest_layer * (1 - work.pruning_ratio))
    fixed = BASE_BYTES + SCORING_ARENA_BYTES + _weights_in_memory(sizes, execution, on_cpu)
    return fixed + states + max(passing, solving) + sliced


def recovery_bytes(sizes: ModelSizes, work: Workload, on_cpu: bool = True) -> int:
    """Return the peak of training adapters; both models are in memory as a whole, the dense one only if it teaches."""
    pruned = sizes.weights - work.pruning_ratio * sizes.block_weights
    # the dense model alone is measured before the pruned one is there
    models = (
        0
        if _mapped(sizes, on_cpu)
        else 4 * max(sizes.weights, pruned + (sizes.weights if work.distillation > 0 else 0))
    )
    adapters = 4 * ADAPTER_COPIES * work.recovery_rank * sizes.adapter_dimensions
    graph = MICROBATCH_TOKENS * sizes.layers * _saved(sizes)
    logits = 4 * LOGIT_BLOCKS * MICROBATCH_TOKENS * sizes.vocabulary
    return int(BASE_BYTES + ADAPTER_LIBRARY_BYTES + ARENA_BYTES + models + adapters + graph + logits)


def perplexity_bytes(sizes: ModelSizes, work: Workload, execution: Execution, on_cpu: bool = True) -> int:
    """Return the peak of token perplexity by a walk."""
    tokens = math.ceil(work.perplexity_tokens / work.window) * work.window
    at_once = min(tokens, max(FORWARD_TOKENS, work.window))
    states = 4 * sizes.hidden * (2 * sizes.streams + 1) * tokens
    passing = 4 * (6 * sizes.hidden + 4 * sizes.neurons) * at_once
    fixed = BASE_BYTES + ARENA_BYTES + 4 * sizes.largest_fused
    return fixed + _weights_in_memory(sizes, execution, on_cpu) + states + passing


def evaluation_bytes(sizes: ModelSizes, work: Workload, on_cpu: bool = True) -> int:
    """Return what lm-eval's tasks take beside the walk of token perplexity: the whole model, logits of a batch."""
    logits = 4 * work.batch_size * HARNESS_TOKENS * sizes.vocabulary
    return HARNESS_BYTES + (0 if _mapped(sizes, on_cpu) else 4 * sizes.weights) + logits


def generation_bytes(sizes: ModelSizes, work: Workload, on_cpu: bool = True) -> int:
    """Return the peak of the benchmark, which has both models in memory."""
    pruned = sizes.weights - work.pruning_ratio * sizes.block_weights
    both = 0 if _mapped(sizes, on_cpu) else 4 * (sizes.weights + pruned)
    passing = 4 * work.prompt_length * (6 * sizes.hidden + 4 * sizes.neurons)
    return int(BASE_BYTES + ARENA_BYTES + both + passing)
