"""Items scored through hidden states: by hand, against plain log-softmaxes, and against lm-eval's own answers."""

import random

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_sentence, tiny_tokenizer
from transformers import AutoModelForCausalLM

from nirvana.errors import InputError
from nirvana.walk import Stack, final_hidden_states
from studies.scoring import score_items
from tasks.corpus.documents import Document
from tasks.evaluation.cloze import cloze_items
from tasks.evaluation.continuation import continuation_items
from tasks.evaluation.lm_eval_task import write_task


class Letters:
    """A tokenizer of the letters a to e."""

    def encode(self, text):
        return ["abcde".index(letter) for letter in text]


# P(next | letter): [next, letter]; what follows b, d and e does not matter
BIGRAMS = torch.full((5, 5), 0.2)
BIGRAMS[:, 0] = torch.tensor([0.02, 0.45, 0.5, 0.02, 0.01])
BIGRAMS[:, 2] = torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1])


def one_hot(ids):
    return torch.nn.functional.one_hot(ids, 5).float()


@pytest.mark.parametrize(("target", "right"), [("c", True), ("b", False), ("cc", True), ("cb", False), ("bc", False)])
def test_a_last_word_by_hand(target, right):
    """After a, c is likeliest; after c, c is."""
    items = [{"context": "ba", "target": target}]
    assert score_items(one_hot, BIGRAMS.log(), items, Letters()).tolist() == [right]


@pytest.mark.parametrize(("choices", "chosen"), [(["b", "c"], 1), (["b", "cc"], 1), (["b", "ca"], 0), (["cb", "d"], 0)])
def test_choices_by_hand(choices, chosen):
    """−ln P a letter: b 0.80, c 0.69, cc (0.69 + 0.51)/2 = 0.60, though 1.20 in all; ca and cb (0.69 + 2.30)/2 = 1.50;
    d 3.91.
    """
    for label in range(2):
        items = [{"context": "ba", "choices": choices, "label": label}]
        assert score_items(one_hot, BIGRAMS.log(), items, Letters()).tolist() == [label == chosen]


@pytest.mark.parametrize("batch_tokens", [1, 37, 10_000])
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_equals_one_sequence_at_a_time(batch_tokens, softcap):
    """A reference without batches, chunks or padding, on a model that adds up all it has read."""
    generator = torch.Generator().manual_seed(0)
    table, head = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    letters = random.Random(0)

    def text(least, most):
        return "".join(letters.choices("abcde", k=letters.randint(least, most)))

    items = []
    for _ in range(40):
        items.append({"context": text(1, 9), "target": text(1, 2)})
        items.append({"context": text(1, 9), "choices": [text(1, 4) for _ in range(4)], "label": letters.randint(0, 3)})

    def hidden_of(ids):
        return table[ids].cumsum(1)

    def logs(context, continuation):
        ids = torch.tensor(Letters().encode(context + continuation))
        logits = hidden_of(ids[None])[0] @ head.T
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        predicted = logits.log_softmax(-1)[len(context) - 1 : -1]
        return predicted, ids[len(context) :]

    expected = []
    for item in items:
        if "target" in item:
            predicted, targets = logs(item["context"], item["target"])
            expected.append(predicted.argmax(-1).tolist() == targets.tolist())
        else:
            pairs = [logs(item["context"], choice) for choice in item["choices"]]
            scores = [predicted.gather(1, targets[:, None]).mean().item() for predicted, targets in pairs]
            expected.append(int(np.argmax(scores)) == item["label"])
    assert score_items(hidden_of, head, items, Letters(), softcap, batch_tokens).tolist() == expected
    assert 10 < sum(expected) < 70


def test_no_call_is_larger_than_asked():
    sizes = []

    def hidden_of(ids):
        sizes.append(ids.shape)
        return one_hot(ids)

    items = [{"context": "a" * length, "target": "b"} for length in (3, 30, 5, 4, 29, 3)]
    score_items(hidden_of, BIGRAMS.log(), items, Letters(), batch_tokens=64)
    # longest first, so that little is padding
    assert sizes == [(2, 31), (4, 6)]


def test_agrees_with_lm_eval(tmp_path, monkeypatch):
    """On a tiny model, its own likeliest words among the targets so that some are right."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    generator = random.Random(0)
    documents = [Document(f"d{i}", " ".join(tiny_sentence(generator) for _ in range(80))) for i in range(8)]
    model_directory = tiny_llama(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_directory).eval(), tiny_tokenizer()
    words = cloze_items(documents, 24)
    for item in words[::2]:
        ids = tokenizer.encode(item["context"])
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if tokenizer.encode(text := item["context"] + tokenizer.decode(token)) == [*ids, token]:
            item["target"] = text.removeprefix(item["context"])
    choices = continuation_items(documents, 24)
    write_task("cloze.yaml", words, tmp_path / "tasks")
    write_task("continuation.yaml", choices, tmp_path / "tasks")
    raw = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5, device="cpu", max_length=512),
        tasks=["cloze", "continuation"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = [*raw["samples"]["cloze"], *raw["samples"]["continuation"]]
    theirs = [bool(sample["acc_norm" if "acc_norm" in sample else "acc"]) for sample in samples]
    stack = Stack.open(model_directory)
    ours = score_items(lambda ids: final_hidden_states(stack, ids), stack.head_weight(), [*words, *choices], tokenizer)
    assert ours.tolist() == theirs
    assert 0 < sum(theirs[:24]) < 24 and 0 < sum(theirs[24:]) < 24


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"context": "a", "answer": "b"}, r"got \['answer', 'context'\]"),
        ({"context": "a", "target": ""}, "adds tokens to its context, got ''"),
        ({"context": "", "target": "a"}, "adds tokens to its context, got 'a'"),
    ],
)
def test_an_odd_item_is_refused(item, said):
    with pytest.raises(InputError, match=said):
        score_items(one_hot, BIGRAMS.log(), [item], Letters())
