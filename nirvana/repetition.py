"""Calibration text of which a part says the same thing twice, so that copying from context counts.

Attention that looks up what stood earlier is rarely needed in a hundred tokens of prose and dearly missed when it is
gone. In a sequence whose second half is its first once more, nearly every token of that half can be copied: what copies
them gets a score, and compensation sees it at work.

Source: Olsson et al. 2022 (arXiv 2209.11895), who find the heads that copy on sequences that repeat themselves.
"""

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray


def with_repetition(
    ids: Int[NDArray[np.int64], "*batches sequences tokens"], share: float
) -> Int[NDArray[np.int64], "*batches sequences tokens"]:
    """Return the sequences, some of them with what follows their first token cut to half and said twice.

    The first token, which may be BOS, stays alone. Where an odd number of tokens follows it, the second saying lacks
    the last one.

    Args:
        ids: Token ids.
        share: Of the sequences of each batch, spread evenly and rounded down; 0: none, 1: all.
    """
    sequences, length = ids.shape[-2:]
    # the slack lets a third of 48 be 16, whatever float makes of a third
    quota = np.floor(np.arange(sequences + 1) * share + 1e-9)
    half = 1 + length // 2
    chosen = np.flatnonzero(np.diff(quota))
    result = ids.copy()
    result[..., chosen, half:] = ids[..., chosen, 1 : 1 + length - half]
    return result
