"""Token perplexity against hand-computed cases and naive cross entropy."""

import math

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana.errors import InputError
from nirvana.perplexity import token_perplexity, windows_from_documents

VOCABULARY = 97
TEXTS = ["The river divides the nation. " * 40, "The army defends the harbor. " * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def _ids(count: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def _naive(model, windows: torch.Tensor, first_target: int) -> float:
    with torch.no_grad():
        log_probabilities = model(windows).logits.double().log_softmax(-1)
    picked = log_probabilities[:, :-1].gather(-1, windows[:, 1:, None]).squeeze(-1)
    return math.exp(-picked[:, first_target - 1 :].mean().item())


def test_uniform_logits_give_the_vocabulary_size(model):
    uniform = LlamaForCausalLM(model.config).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert token_perplexity(uniform, _ids(3, 20)) == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize("first_target", [1, 2, 7])
# one window a forward, several, and a last forward that is not full
@pytest.mark.parametrize("shape", [(2, 600), (5, 128), (7, 200)])
def test_equals_naive_cross_entropy(model, shape, first_target):
    windows = _ids(*shape)
    expected = _naive(model, windows, first_target)
    assert expected != pytest.approx(VOCABULARY, rel=0.05)
    assert token_perplexity(model, windows, first_target) == pytest.approx(expected, rel=1e-5)


def test_nan_logits_are_an_error(model):
    broken = LlamaForCausalLM(model.config).eval()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(InputError, match="nan"):
        token_perplexity(broken, _ids(1, 8))


def test_windows_with_bos(tokenizer):
    windows = windows_from_documents(tokenizer, TEXTS, window=16, tokens=40)
    assert windows.shape == (3, 16)  # 40 tokens, rounded up to whole windows
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(windows[0, 1:]).startswith("The river divides")


def test_windows_without_bos_rejoin_to_the_text(tokenizer):
    stream = [id_ for text in TEXTS for id_ in tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]]
    every = len(stream) // 8
    windows = windows_from_documents(tokenizer, TEXTS, window=8, tokens=8 * every, add_bos=False)
    assert windows.flatten().tolist() == stream[: 8 * every]


def test_windows_are_taken_from_all_of_the_text(tokenizer):
    windows = windows_from_documents(tokenizer, TEXTS, window=16, tokens=64)
    texts = [tokenizer.decode(window[1:]) for window in windows]
    assert any("river" in text for text in texts)
    assert any("army" in text for text in texts)


def test_too_little_text_names_what_there_is(tokenizer):
    with pytest.raises(InputError, match=r"at most \d+.*got 1000000"):
        windows_from_documents(tokenizer, TEXTS, window=16, tokens=1_000_000)


def test_bos_that_the_tokenizer_lacks_is_an_error(tokenizer):
    without = tiny_tokenizer()
    without.bos_token = None
    with pytest.raises(InputError, match="BOS"):
        windows_from_documents(without, TEXTS, window=16, tokens=16)
    assert windows_from_documents(without, TEXTS, window=16, tokens=16, add_bos=False).shape == (1, 16)
