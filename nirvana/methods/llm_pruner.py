"""LLM-Pruner: first-order Taylor scores, the first and last layers left alone, the same share from every other layer.

A unit scores Σ|W · ∂loss/∂W| over its weights, the loss that of the next token (`--taylor param_first`, the sum over
coupled matrices). Within each layer that is pruned, KV groups compete with KV groups and neurons with neurons, and
the number of KV groups that leave is rounded down (`nirvana.allocation`).

Source: LLM-Pruner (arXiv 2305.11627), block-wise pruning; horseee/LLM-Pruner, hf_prune.py and
LLMPruner/pruner/hf_llama_pruner.py at 07ece7a, llama3.py at aaab7ba.

Protected layers: hf_prune.py and llama3.py prune layers 3 to 30 of LLaMA's 32 unless told otherwise, three first and
one last stay whole; so do we, in proportion to the depth (SmolLM2's 30 layers: the same numbers). The README's recipe
for LLaMA-7B protects four and two. On SmolLM2 that is worse: perplexity 73.9 and 165.0 at ratio 0.2 and 0.4 where
three and one give 73.1 and 152.6 (first 2,048 reference tokens of WikiText-2).

The published code's bug with grouped queries: its importance folds a vector of all query heads (q_proj's rows,
o_proj's columns) onto the KV heads by `imp.view(len(imp) // size, size).sum(0)`, which credits KV head g with the
query heads g, g + n_kv, g + 2·n_kv, …; but transformers lays out the heads of a group side by side, and what the code
then removes are the heads g·queries_per_kv to (g + 1)·queries_per_kv − 1. So groups are judged by other groups'
heads. We credit a KV group with the heads that leave with it (`nirvana.architectures.site`).

Deviations: (1) the above. (2) Calibration text as every other method, not 10 samples of 64 tokens of BookCorpus. (3)
No second-order term (`param_mix`, hf_prune.py's default; llama3.py's is `param_first`). (4) Where whole KV groups
miss the share, neurons make up for it; the code misses the budget.
"""

from jaxtyping import Float
from torch import Tensor

from nirvana.methods.lm_loss import lm_loss
from nirvana.methods.method import Scoring
from nirvana.walk import Ids, Stack


def llm_pruner(stack: Stack, ids: Ids, scoring: Scoring) -> dict[str, Float[Tensor, " units"]]:
    """Return LLM-Pruner's score of each unit; those of protected layers are not used."""
    return lm_loss(stack, ids, scoring)
