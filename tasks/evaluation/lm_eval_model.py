"""lm-eval's Hugging Face model, computing only the logits that a continuation is scored on.

The stock class asks for the logits of every position and takes the logarithm of their softmax: for a last word after
eighty tokens, a fifth of the arithmetic, and at 2,048 tokens of a 128k vocabulary a gigabyte a sample.
"""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from nirvana.checkpoint.tokenizer import begins_with
from tasks.corpus.writing import ends_unspaced


class ContinuationLM(HFLM):
    """HFLM whose model calls keep the last positions only, and whose texts begin with BOS once, as elsewhere here.

    HFLM leaves special tokens to the tokenizer: an EOS behind the context would be counted as a word of it, and where
    a whole document is scored, a BOS that the tokenizer puts would be the first word behind another BOS.

    HFLM looks for a continuation from the end of what the model returns (`_loglikelihood_tokens`: `ctx_len`), so that
    leading positions may be missing. An encoder-decoder's decoder reads the continuation only: there is nothing to
    leave out.
    """

    _longest_continuation = 0
    _whole_documents = False

    @property
    def prefix_token_id(self) -> int:
        """What conditions a text's first token: what the tokenizer itself puts there, else BOS or EOS."""
        beginning = begins_with(self.tokenizer) if self.backend == "causal" else None
        return super().prefix_token_id if beginning is None else beginning

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> list[int]:
        """Return a text's tokens, behind what the tokenizer itself begins a text with; never anything behind them."""
        if self.backend != "causal":
            return super().tok_encode(string, add_special_tokens, *args, **kwargs)
        tokens = super().tok_encode(string, False, *args, **kwargs)
        beginning = begins_with(self.tokenizer)
        if add_special_tokens is False or self._whole_documents or beginning is None or tokens[:1] == [beginning]:
            return tokens
        return [beginning, *tokens]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prompts to go on from, each as `tok_encode` gives it, padded to one length."""
        if self.backend != "causal":
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **kwargs)
        rows = [self.tok_encode(string)[-(left_truncate_len or 0) :] for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
        """Return log-likelihoods of whole documents: every token once, the first one behind `prefix_token_id`."""
        self._whole_documents = True
        try:
            return super().loglikelihood_rolling(*args, **kwargs)
        finally:
            self._whole_documents = False

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenise context and continuation, together where a space parts them.

        Within Chinese, Japanese or Thai a token may go over the end of the context. HFLM would then score what is left
        of the continuation behind that token, or nothing.
        """
        whole, rest = super()._encode_pair(context, continuation)
        if ends_unspaced(context) and self.tok_encode(context + continuation) != [*whole, *rest]:
            rest = self.tok_encode(continuation, add_special_tokens=False)
        return whole, rest

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
