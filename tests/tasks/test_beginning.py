"""How a text begins: as the tokenizer itself puts it, in calibration, perplexity and tasks, dense and pruned."""

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from nirvana.checkpoint.tokenizer import begins_with
from nirvana.loading import load_config
from tasks.corpus.documents import Document
from tasks.evaluation.lm_eval_model import ContinuationLM
from tasks.evaluation.perplexity_text import perplexity_text
from tasks.sample_pool import Encoder

PUT = {"nothing": "$A", "bos": "<s> $A", "bos-eos": "<s> $A </s>", "eos": "$A </s>"}
BEGINNING = {"nothing": None, "bos": 0, "bos-eos": 0, "eos": None}
TEXT = "The great nation protects the river of the law. The quiet farmer opens the new railway of the court."


def putting(what, folder):
    tokenizer = tiny_tokenizer()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=PUT[what], special_tokens=[pair for pair in special if pair[0] in PUT[what]]
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for what in PUT:
        putting(what, tiny_llama(root / what))
    return root


@pytest.mark.parametrize("what", PUT)
def test_calibration_and_perplexity_begin_alike(what, models):
    folder = models / what
    tokenizer, expected = AutoTokenizer.from_pretrained(folder), BEGINNING[what]
    assert begins_with(tokenizer) == expected
    encoder = Encoder.of_model(folder, None)
    assert encoder.bos == expected
    assert encoder(Document("a", TEXT)).tolist() == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    judged = perplexity_text(tokenizer, load_config(folder), [Document("a", TEXT)], 8, 16)
    assert judged.bos == (expected is not None)
    begins = (judged.windows[:, 0] == 0).tolist()
    assert begins == [judged.bos] * len(begins)
    assert not (judged.windows[:, 1:] < 2).any()  # once, and nothing behind


@pytest.mark.parametrize(("asked", "expected"), [(True, 0), (False, None), (None, None)])
def test_what_calibration_asks_for_counts(asked, expected, models):
    assert Encoder.of_model(models / "nothing", asked).bos == expected
    assert Encoder.of_model(models / "bos", True).bos == 0
    assert Encoder.of_model(models / "bos", False).bos is None


def log_probability(model, ids, first):
    """Return the sum over ids[first:], from all logits of one forward."""
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(logs[place - 1, ids[place]].item() for place in range(first, len(ids)))


@pytest.mark.parametrize("what", PUT)
def test_tasks_score_each_word_once_behind_one_beginning(what, models):
    model = AutoModelForCausalLM.from_pretrained(models / what, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / what)
    judge = ContinuationLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=64)
    begin = [] if BEGINNING[what] is None else [0]
    context, rest = "The great nation", " protects the river."
    plain = tokenizer(context + rest, add_special_tokens=False)["input_ids"]
    words = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ((value, _),) = judge.loglikelihood([Instance("loglikelihood", {}, (context, rest), 0)], disable_tqdm=True)
    assert value == pytest.approx(log_probability(model, begin + plain, len(begin) + words), rel=1e-4)
    (rolled,) = judge.loglikelihood_rolling([Instance("rolling", {}, (context + rest,), 0)], disable_tqdm=True)
    # the first word needs something to stand behind: BOS, once, also where the tokenizer puts none
    assert rolled == pytest.approx(log_probability(model, [0, *plain], 1), rel=1e-4)
    with_own = judge.loglikelihood([Instance("loglikelihood", {}, ("<s>" + context, rest), 0)], disable_tqdm=True)
    assert with_own[0][0] == pytest.approx(log_probability(model, [0, *plain], 1 + words), rel=1e-4)
    batch, mask = judge.tok_batch_encode([context, context + rest])
    assert batch[1].tolist() == begin + plain and mask.sum(1).tolist() == [len(begin) + words, len(begin) + len(plain)]
    assert batch[0, -words:].tolist() == plain[:words]
