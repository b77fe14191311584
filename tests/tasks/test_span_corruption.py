"""Sources and targets: a pair by hand, nothing lost between them, fixed lengths, the same spans every time."""

import numpy as np
import pytest
from tiny import t5_configs, tiny_t5_tokenizer

from nirvana.errors import InputError
from tasks.corpus.span_corruption import HALVES, SPANS, PairMaker, span_counts

SENTINELS = tuple(range(900, 1000))
MAKER = PairMaker(SENTINELS, eos=1, start=0)


def stretches(count: int, length: int) -> np.ndarray:
    """Stretches whose tokens all differ."""
    return 2000 + np.arange(count * length).reshape(count, length)


def restored(source: list[int], target: list[int]) -> list[int]:
    """Put each span of the target back where its sentinel stands in the source."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    text: list[int] = []
    for token in source[:-1]:
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return text


def test_counts_of_the_paper():
    # T5 pre-trains on 512 tokens of source: 15 % of 568 in spans of 3, as in its own code
    noise, spans = span_counts(568)
    assert (noise, spans) == (85, 28)
    assert 568 - noise + spans + 1 == 512
    assert [span_counts(length) for length in (2, 3, 7, 20, 128)] == [(1, 1), (1, 1), (1, 1), (3, 1), (19, 6)]


@pytest.mark.parametrize("length", [2, 3, 10, 33, 128, 500])
def test_source_and_target_hold_the_text_once(length):
    text = stretches(5, length)
    pairs = MAKER(text, "seed")
    noise, spans = span_counts(length)
    assert pairs.input_ids.shape == (5, length - noise + spans + 1)
    assert pairs.labels.shape == pairs.decoder_input_ids.shape == (5, noise + spans + 1)
    assert {array.dtype for array in (pairs.input_ids, pairs.labels, pairs.decoder_input_ids)} == {np.dtype(np.int64)}
    for row, source, target, shifted in zip(text, pairs.input_ids, pairs.labels, pairs.decoder_input_ids, strict=True):
        assert restored(source.tolist(), target.tolist()) == row.tolist()
        assert source[-1] == target[-1] == 1
        assert source[0] not in SENTINELS and target[0] == SENTINELS[0]  # text first, so a span last
        assert shifted.tolist() == [0, *target[:-1]]


def test_a_short_stretch_by_hand():
    # one token of ten leaves... two of them do (1.5 rounded to even), in one span: only where it stands is chosen
    pairs = MAKER(np.arange(10, 20)[None], "seed")
    assert pairs.input_ids.tolist() == [[*range(10, 18), 900, 1]]
    assert pairs.labels.tolist() == [[900, 18, 19, 1]]
    assert pairs.decoder_input_ids.tolist() == [[0, 900, 18, 19]]


def test_spans_depend_on_seed_and_text_alone():
    text = stretches(6, 128)
    pairs = MAKER(text, "a")
    assert (MAKER(text[::-1], "a").input_ids[::-1] == pairs.input_ids).all()
    assert (MAKER(text[3:4], "a").labels == pairs.labels[3:4]).all()
    assert (MAKER(text, "b").input_ids != pairs.input_ids).any(axis=1).all()
    where = [np.flatnonzero(np.isin(row, SENTINELS)).tolist() for row in pairs.input_ids]
    assert len({tuple(each) for each in where}) == 6


def test_spans_are_spread_over_the_text():
    text = stretches(400, 128)
    lost = np.array([np.isin(row, target) for row, target in zip(text, MAKER(text, "a").labels, strict=True)])
    assert lost.sum(axis=1).tolist() == [19] * 400
    # away from the ends, which begin with text and end with a span, every position leaves as often as another
    assert lost.mean(axis=0)[10:110].min() > 0.07
    assert lost.mean(axis=0)[10:110].max() < 0.25


def test_without_sentinels_the_text_is_halved():
    pairs = PairMaker((), eos=1, start=7)(stretches(2, 5), "seed")
    assert pairs.input_ids.tolist() == [[2000, 2001, 1], [2005, 2006, 1]]
    assert pairs.labels.tolist() == [[2002, 2003, 2004, 1], [2007, 2008, 2009, 1]]
    assert pairs.decoder_input_ids.tolist() == [[7, 2002, 2003, 2004], [7, 2007, 2008, 2009]]


def test_of_a_model():
    config = t5_configs()["t5-relu-tied"]
    tokenizer = tiny_t5_tokenizer()
    maker = PairMaker.of_model(tokenizer, config)
    assert maker.kind == SPANS
    assert tokenizer.convert_ids_to_tokens(maker.sentinels) == [f"<extra_id_{number}>" for number in range(100)]
    assert (maker.eos, maker.start) == (1, 0)
    assert PairMaker.of_model(tiny_t5_tokenizer(sentinels=0), config).kind == HALVES


def test_what_a_model_must_have():
    config, tokenizer = t5_configs()["t5-relu-tied"], tiny_t5_tokenizer()
    config.decoder_start_token_id = None
    with pytest.raises(InputError, match="decoder_start_token_id"):
        PairMaker.of_model(tokenizer, config)
    config.decoder_start_token_id = 0
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="EOS"):
        PairMaker.of_model(tokenizer, config)


def test_too_few_sentinels_are_said():
    with pytest.raises(InputError, match="expected stretches of text that 2 sentinel tokens suffice for, got 128"):
        PairMaker((900, 901), eos=1, start=0)(stretches(1, 128), "seed")
