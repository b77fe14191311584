"""Token perplexity against hand-computed cases and naive cross entropy."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import all_families, ids_for, logits_of, random_ids, save_family, t5_configs, tiny_tokenizer
from torch.nn.functional import cross_entropy

from nirvana.errors import InputError
from nirvana.loading import load_model
from nirvana.perplexity import token_perplexity, windows_from_documents
from nirvana.walk import Stack

TEXTS = ["The river divides the nation. " * 40, "The army defends the harbor. " * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_uniform_logits_give_the_vocabulary_size(tmp_path):
    model = save_family("llama-untied-biases", tmp_path) / "model.safetensors"
    weights = load_file(model)
    save_file(weights | {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])}, model, {"format": "pt"})
    ids = random_ids(3, 20)
    assert token_perplexity(Stack.open(tmp_path), ids, ids[:, 1:]) == pytest.approx(512, rel=1e-6)


# one window a forward, several, and a last forward that is not full
@pytest.mark.parametrize(("shape", "first_target"), [((2, 400), 1), ((5, 128), 2), ((7, 300), 7)])
def test_equals_naive_cross_entropy(shape, first_target, tmp_path):
    save_family("llama", tmp_path)
    windows = random_ids(*shape)
    with torch.no_grad():
        logits = load_model(tmp_path)(windows).logits[:, first_target - 1 : -1].double()
    expected = math.exp(cross_entropy(logits.flatten(0, 1), windows[:, first_target:].flatten()))
    measured = token_perplexity(Stack.open(tmp_path), windows, windows[:, first_target:])
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", all_families())
def test_equals_the_model_and_streamed_equals_resident(name, tmp_path):
    save_family(name, tmp_path)
    ids = ids_for(name, 3, 12)
    encoder_decoder = isinstance(ids, tuple)
    targets = random_ids(3, ids[1].shape[1], seed=5) if encoder_decoder else ids[:, 2:]
    with torch.no_grad():
        logits = logits_of(load_model(tmp_path), ids)
    logits = logits if encoder_decoder else logits[:, 1:-1]
    expected = math.exp(cross_entropy(logits.flatten(0, 1).double(), targets.flatten()))
    resident = token_perplexity(Stack.open(tmp_path), ids, targets)
    assert resident == pytest.approx(expected, rel=1e-4)
    assert token_perplexity(Stack.open(tmp_path, execution="streamed"), ids, targets) == resident


@pytest.mark.parametrize("name", t5_configs())
def test_targets_of_an_encoder_decoder(name, tmp_path):
    """transformers shifts and averages by itself; the source matters, the order of pairs does not."""
    save_family(name, tmp_path)
    stack, generator = Stack.open(tmp_path), torch.Generator().manual_seed(0)
    source, labels = (torch.randint(2, 512, (5, size), generator=generator) for size in (21, 9))
    with torch.no_grad():
        expected = math.exp(load_model(tmp_path)(input_ids=source, labels=labels).loss.item())
    shifted = torch.cat([torch.zeros(5, 1, dtype=torch.int64), labels[:, :-1]], dim=1)
    assert token_perplexity(stack, (source, shifted), labels) == pytest.approx(expected, rel=1e-4)
    assert token_perplexity(stack, (source.flip(1), shifted), labels) != pytest.approx(expected, rel=1e-4)
    flipped = token_perplexity(stack, (source.flip(0), shifted.flip(0)), labels.flip(0))
    assert flipped == pytest.approx(expected, rel=1e-4)


def test_nan_logits_are_an_error(tmp_path):
    model = save_family("llama", tmp_path) / "model.safetensors"
    weights = load_file(model)
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, model, {"format": "pt"})
    with pytest.raises(InputError, match="nan"):
        token_perplexity(Stack.open(tmp_path), random_ids(1, 8), random_ids(1, 7))


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
