"""Keeping the last positions only changes nothing: compared with lm-eval's own class."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tiny import tiny_llama, tiny_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tasks.evaluation.lm_eval_model import ContinuationLM


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 3, "device": "cpu", "max_length": 24}
    return HFLM(**settings), ContinuationLM(**settings)


def _requests(one_token: bool) -> list[tuple[None, list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 512, (count,), generator=generator).tolist()

    varied = [(None, ids(length), ids(1 + length % 4)) for length in (1, 2, 5, 9, 20, 22)]
    # id 0 is what batches are padded with: as a last, and as a whole, context
    zeros = [(None, [*ids(6), 0, 0], [0, 5]), (None, [0, 0, 0], [7]), (None, ids(40), ids(3))]
    context = ids(8)
    choices = [(None, context, ids(1)) for _ in range(4)]  # answered from one forward
    return varied + zeros + choices if not one_token else choices


@pytest.mark.parametrize("one_token", [False, True])
def test_equals_the_stock_class(pair, one_token):
    stock, ours = (each._loglikelihood_tokens(_requests(one_token), disable_tqdm=True) for each in pair)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in stock], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in stock]
    assert len({round(value, 3) for value, _ in stock}) == len(stock)


def test_fewer_logits_are_computed(pair, monkeypatch):
    _, ours = pair
    positions = []
    forward = ours.model.forward

    def spy(*args, **kwargs):
        output = forward(*args, **kwargs)
        positions.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(ours.model, "forward", spy)
    ours._loglikelihood_tokens([(None, list(range(2, 22)), [5, 6])], disable_tqdm=True)
    assert positions == [2]


def test_an_encoder_decoder_is_scored_as_its_logits_say(tmp_path):
    folder = tiny_t5(tmp_path / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = ContinuationLM(
        pretrained=model, tokenizer=tokenizer, backend="seq2seq", batch_size=3, device="cpu", max_length=24
    )
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 1), (9, 4), (20, 2), (7, 7)]
    requests = [
        tuple(torch.randint(2, 512, (count,), generator=generator).tolist() for count in pair) for pair in lengths
    ]
    answers = ours._loglikelihood_tokens([(None, *request) for request in requests], disable_tqdm=True)
    for (source, target), (value, greedy) in zip(requests, answers, strict=True):
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0].log_softmax(-1)
        expected = logs.gather(1, torch.tensor(target)[:, None]).sum().item()
        assert value == pytest.approx(expected, rel=1e-5)
        assert greedy == (logs.argmax(-1).tolist() == target)
