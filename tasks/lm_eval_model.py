"""lm-eval's Hugging Face model, computing only the logits that a continuation is scored on.

The stock class asks for the logits of every position and takes the logarithm of their softmax: for a last word after
eighty tokens, a fifth of the arithmetic, and at 2,048 tokens of a 128k vocabulary a gigabyte a sample.
"""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM


class ContinuationLM(HFLM):
    """HFLM whose model calls keep the last positions only.

    HFLM looks for a continuation from the end of what the model returns (`_loglikelihood_tokens`: `ctx_len`), so that
    leading positions may be missing. An encoder-decoder's decoder reads the continuation only: there is nothing to
    leave out.
    """

    _longest_continuation = 0

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self._longest_continuation = max((len(continuation) for _, _, continuation in requests), default=0)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.backend == "seq2seq":
            return super()._model_call(inps, *args, **kwargs)
        # HFLM pads on the right with zeros. A real last token of id 0 counts as padding too: one position too many.
        longest_padding = int(inps.flip(-1).eq(0).cumprod(-1).sum(-1).max())
        keep = min(inps.shape[-1], longest_padding + self._longest_continuation)
        with torch.inference_mode():
            return self.model(inps, use_cache=False, logits_to_keep=keep).logits
