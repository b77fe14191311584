"""Splits by document, and a pool whose beginning does not depend on its size."""

import hashlib
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save
from tiny import tiny_corpus, tiny_llama, tiny_t5

from nirvana.errors import InputError
from tasks import sample_pool
from tasks.corpus.documents import Document, read_documents, write_documents
from tasks.corpus.span_corruption import HALVES, SPANS, PairMaker
from tasks.sample_pool import Encoder, documents_of, draw, draw_candidates, run, split_documents

NAMES = ("calibration.pool_size", "calibration.sequences", "calibration.sequence_length")


def letters(text, **_):
    """Stand in for a tokenizer: one token a character."""
    return {"input_ids": [ord(character) for character in text]}


def make_documents(lengths):
    """Documents whose characters all differ, so that every token tells its document and position."""
    ends = np.cumsum([0, *lengths])
    return [
        Document(f"d{i}", "".join(chr(0x10000 + c) for c in range(ends[i], ends[i + 1]))) for i in range(len(lengths))
    ]


def owner(documents, token):
    return next(document.id for document in documents if chr(token) in document.text)


def draw_pool(documents, batches=3, sequences=4, length=16, order="calibration 0", bos=None):
    encoder = Encoder(letters, vocabulary=0x110000, bos=bos)
    return draw(documents, encoder, batches=batches, sequences=sequences, length=length, order=order, names=NAMES)


def test_split_is_by_the_hash_of_the_name_alone():
    documents = [Document(f"name {i}", "x") for i in range(4000)]
    splits = split_documents(documents)
    shares = {name: len(part) / 4000 for name, part in splits.items()}
    assert shares == pytest.approx({"calibration": 0.7, "heldout": 0.1, "evaluation": 0.2}, abs=0.03)
    # by hand: the first eight bytes of SHA-256 as a fraction
    fraction = int(hashlib.sha256(b"name 0").hexdigest()[:16], 16) / 2**64
    expected = "calibration" if fraction < 0.7 else "heldout" if fraction < 0.8 else "evaluation"
    assert documents[0] in splits[expected]
    fewer = split_documents(documents[::2])
    assert all(set(fewer[name]) <= set(splits[name]) for name in splits)
    assert splits["evaluation"] == [document for document in documents if document in set(splits["evaluation"])]


def test_sources_give_a_document_each_in_turn():
    few = [document._replace(source=1) for document in make_documents([40] * 8)]
    short = [Document(f"short {number}", "abc", 1) for number in range(30)]
    many = [Document(f"m{number}", chr(65 + number) * 40) for number in range(40)]
    ours = {document.id for document in few}
    pool = draw_pool([*many, *few, *short], batches=3, sequences=5)
    # the second one has documents for eight sequences, and short ones do not count
    assert [sum(name in ours for name in batch) for batch in pool.documents] == [2, 3, 2]
    # what one source gives, it gives in the order in which it does alone
    alone = draw_pool(many, batches=3, sequences=5)
    names = [name for batch in pool.documents for name in batch if name not in ours]
    assert names == [name for batch in alone.documents for name in batch][: len(names)]
    pool = draw_pool([*many, *few, *short], batches=3, sequences=9)
    assert sum(name in ours for batch in pool.documents for name in batch) == 8
    # too few documents for a sequence each: documents still alternate, and long ones give more
    long = [Document(f"l{number}", chr(65 + number) * 160) for number in range(3)]
    pool = draw_pool([*long, *(Document(f"o{number}", "a" * 20, 1) for number in range(3))], batches=1, sequences=9)
    assert [name[0] for name in pool.documents[0]] == ["l", "o"] * 3
    assert (pool.input_ids[0] == ord("a")).all(axis=1).sum() == 3


def test_sequences_are_windows_of_documents_of_their_own():
    documents = make_documents([10] * 5 + [50, 16, 300] * 6)
    pool = draw_pool(documents)
    assert pool.input_ids.shape == (3, 4, 16)
    assert pool.input_ids.dtype == np.int64
    assert (np.diff(pool.input_ids, axis=-1) == 1).all()  # contiguous
    owners = [[owner(documents, row[0]) for row in batch] for batch in pool.input_ids]
    assert owners == [[owner(documents, row[-1]) for row in batch] for batch in pool.input_ids]
    assert len({name for batch in owners for name in batch}) == 12
    assert owners == pool.documents


def test_windows_are_spread_over_long_documents():
    documents = make_documents([1000] * 40)
    pool = draw_pool(documents, batches=10)
    first = {document.id: ord(document.text[0]) for document in documents}
    starts = [row[0] - first[owner(documents, row[0])] for row in pool.input_ids.reshape(-1, 16)]
    assert min(starts) < 250 and max(starts) > 735 and len(set(starts)) > 30


def test_larger_pool_begins_with_the_same_candidates():
    documents = make_documents([64] * 40)
    small, large = draw_pool(documents, batches=2), draw_pool(documents, batches=10)
    assert (large.input_ids[:2] == small.input_ids).all()
    assert small.documents == large.documents[:2]


def test_order_of_documents_does_not_matter_but_the_seed_does():
    documents = make_documents([64] * 40)
    pool = draw_pool(documents)
    assert (draw_pool(documents[::-1]).input_ids == pool.input_ids).all()
    assert (draw_pool(documents, order="calibration 1").input_ids != pool.input_ids).any()


def test_few_long_documents_give_several_sequences_without_overlap():
    documents = make_documents([200] * 5)
    pool = draw_pool(documents, batches=2)
    assert len(np.unique(pool.input_ids)) == pool.input_ids.size  # no token twice
    one, two = (set(names) for names in pool.documents)
    assert not one & two
    # two sequences a document suffice, so no document gives more
    assert [len(one), len(two)] == [2, 2]


def test_bos_takes_the_first_place_of_each_sequence():
    documents = make_documents([64] * 20)
    plain, marked = draw_pool(documents), draw_pool(documents, bos=7)
    assert (marked.input_ids[..., 0] == 7).all()
    assert (marked.input_ids[..., 1:] == plain.input_ids[..., 1:]).all()


@pytest.mark.parametrize(("lengths", "allowed"), [([16] * 11, 2), ([15] * 50, 0), ([64] * 2, 2), ([], 0)])
def test_too_large_a_pool_says_what_is_allowed(lengths, allowed):
    with pytest.raises(InputError, match=f"expected 3 x 4 sequences of 16 .* allows {allowed} such batches .* lower"):
        draw_pool(make_documents(lengths))
    if allowed:
        assert len(draw_pool(make_documents(lengths), batches=allowed).input_ids) == allowed


@pytest.mark.parametrize("sequences", [1_000, 1_000_000, 10**12])
def test_numbers_beyond_any_corpus_end_at_once(sequences):
    begin = time.process_time()
    with pytest.raises(InputError, match=f"3 x {sequences} sequences of 16 tokens.*lower calibration.pool_size, cali"):
        draw_pool(make_documents([40] * 50 + [4000] * 3), sequences=sequences)
    assert time.process_time() - begin < 2


def test_shares_that_cannot_suffice_are_left_out_and_change_nothing():
    """Against a search that tries each share from 1 up."""
    generator = random.Random(0)
    for _ in range(40):
        documents = make_documents(generator.choices(range(5, 300), k=8))
        encoder = Encoder(letters, vocabulary=0x110000)
        batches, sequences = generator.randint(1, 3), generator.randint(2, 30)
        ordered = sorted(documents, key=lambda each: sample_pool._hash("o", each.id))
        usable = [document for document in ordered if len(document.text) >= 8]
        plans = (
            sample_pool._assign(usable, encoder, batches, sequences, 8, share) for share in range(1, sequences + 1)
        )
        expected = next((plan for plan in plans if len(plan) == batches), None)
        settings = {"batches": batches, "sequences": sequences, "length": 8, "order": "o", "names": NAMES}
        if expected is None:
            with pytest.raises(InputError, match="allows"):
                draw(documents, encoder, **settings)
        else:
            found = draw(documents, encoder, **settings)
            assert found.documents == [[document.id for document, _ in batch] for batch in expected]


def test_messages_name_keys_that_exist(model, corpus, tmp_path):
    for changes, keys in (
        ({"heldout_sequences": 5000}, "lower calibration.heldout_sequences or calibration.heldout_length, or use"),
        ({"method": "least_squares"}, "lower compensation.sequences or compensation.sequence_length, or use"),
    ):
        with pytest.raises(InputError, match=keys):
            sample(model, corpus, tmp_path, compensation_sequences=5000, **changes)


def test_copies_go_where_the_first_of_them_goes(caplog):
    texts = [f"document {number} with words of its own, however few they may be" for number in range(200)]
    copies = [Document(f"copy {number}", f"  {text.upper()}\n") for number, text in enumerate(texts)]
    splits = split_documents([Document(f"name {number}", text) for number, text in enumerate(texts)] + copies)
    for documents in splits.values():
        names = {document.id.split()[1] for document in documents if document.id.startswith("name")}
        assert names == {document.id.split()[1] for document in documents if document.id.startswith("copy")}
    assert "200 of 400 documents are copies" in caplog.text


def test_short_rows_are_joined_and_it_is_said(caplog):
    documents = make_documents([10] * 60)
    encoder = Encoder(letters, vocabulary=0x110000)
    asked = SimpleNamespace(pool_size=2, sequences=4, sequence_length=16, seed=0)
    pool = draw_candidates(asked, documents, encoder)
    assert all("+1" in name for batch in pool.documents for name in batch)
    assert "of 60, neighbours are joined by a blank line, which makes 30" in caplog.text
    joined = "\n\n".join(document.text for document in documents)
    assert all("".join(map(chr, row)) in joined for row in pool.input_ids.reshape(-1, 16))
    # what suffices is left as it is
    caplog.clear()
    pool = draw_candidates(asked, documents + make_documents([10] * 60 + [30] * 8)[60:], encoder)
    assert not any("+" in name for batch in pool.documents for name in batch)
    assert not caplog.text


def test_long_text_is_tokenised_in_pieces_and_little_is_kept(monkeypatch):
    lengths = []

    def spy(text, **_):
        lengths.append(len(text))
        return letters(text)

    monkeypatch.setattr(sample_pool, "LONGEST", 100)
    monkeypatch.setattr(sample_pool, "_TOKENS_HELD", 1000)
    encoder = Encoder(spy, vocabulary=0x110000)
    long = Document("long", "word and " * 50)
    tokens = encoder(long)
    assert max(lengths) <= 100
    assert "".join(map(chr, tokens)).replace(" ", "") == long.text.replace(" ", "")
    for number in range(50):
        encoder(Document(f"d{number}", "x" * 90))
    assert len(encoder._tokens) < 10
    assert (encoder(long) == tokens).all()
    # one name, two texts
    assert len(encoder(Document("d", "abc"))) != len(encoder(Document("d", "abcd")))


def test_token_outside_the_vocabulary():
    encoder = Encoder(letters, vocabulary=100)
    assert encoder(Document("fits", "abc")).tolist() == [97, 98, 99]
    assert encoder(Document("fits", "abc")).dtype == np.int64  # what a model reads
    with pytest.raises(InputError, match="document odd: token 100 is outside the model's vocabulary of 100"):
        encoder(Document("odd", "abcd"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("pool") / "model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    texts = sorted(tiny_corpus(root / "texts").iterdir())
    (root / "corpus").mkdir()
    write_documents(root / "corpus" / "documents.jsonl", (Document(file.stem, file.read_text()) for file in texts))
    return root / "corpus"


def sample(model, corpus, target, **changes):
    settings = {
        "seed": 0,
        "pool_size": 3,
        "sequences": 4,
        "sequence_length": 16,
        "add_bos": False,
        "heldout_sequences": 2,
        "heldout_length": 32,
        "repeated": 0.0,
    }
    compensation = {"method": "none", "sequences": 5, "sequence_length": 16}
    compensation |= {key: changes.pop(key) for key in ("method",) if key in changes}
    compensation["sequences"] = changes.pop("compensation_sequences", 5)
    params = SimpleNamespace(
        calibration=SimpleNamespace(**(settings | changes)), compensation=SimpleNamespace(**compensation)
    )
    outputs = {
        "candidates": target / "candidates.safetensors",
        "heldout": target / "heldout.safetensors",
        "compensation_corpus": target / "compensation.safetensors",
        "evaluation_data": target / "evaluation",
    }
    run(params, {"model": model, "corpus": corpus}, outputs)
    return outputs


def test_the_source_of_a_document_goes_with_it(model, corpus, tmp_path):
    documents = read_documents(corpus / "documents.jsonl")
    several = [Document(f"1:{each.id}", each.text, 1) for each in documents]
    (tmp_path / "corpus").mkdir()
    write_documents(tmp_path / "corpus" / "documents.jsonl", [*documents, *several])
    outputs = sample(model, tmp_path / "corpus", tmp_path / "out")
    batches = documents_of(outputs["candidates"])
    assert [sum(name.startswith("1:") for name in batch) for batch in batches] == [2, 2, 2]
    judged = read_documents(outputs["evaluation_data"] / "documents.jsonl")
    assert {each.source for each in judged} == {0, 1}
    assert all((each.source == 1) == each.id.startswith("1:") for each in judged)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_step_writes_disjoint_parts(model, corpus, tmp_path):
    outputs = sample(model, corpus, tmp_path, add_bos=True)
    used = []
    for name, shape in (("candidates", (3, 4, 16)), ("heldout", (2, 32))):
        with safe_open(outputs[name], "numpy") as file:
            ids = file.get_tensor("input_ids")
            used += [document for batch in json.loads(file.metadata()["documents"]) for document in batch]
        assert ids.shape == shape and ids.dtype == np.int64
        assert (ids[..., 0] == 0).all() and (ids[..., 1:] > 1).all()
    evaluation = read_documents(outputs["evaluation_data"] / "documents.jsonl")
    used += [document.id for document in evaluation]
    assert len(used) == len(set(used))
    texts = {document.id: document.text for document in read_documents(corpus / "documents.jsonl")}
    assert all(document.text == texts[document.id] for document in evaluation)


def test_step_repeats_byte_for_byte_and_keeps_evaluation_apart(model, corpus, tmp_path):
    first = sample(model, corpus, tmp_path / "a")
    again = sample(model, corpus, tmp_path / "b")
    other = sample(model, corpus, tmp_path / "c", pool_size=2, seed=5)
    for name, file in (("candidates", ""), ("heldout", ""), ("evaluation_data", "documents.jsonl")):
        assert digest(first[name] / file if file else first[name]) == digest(
            again[name] / file if file else again[name]
        )
    assert digest(first["candidates"]) != digest(other["candidates"])
    assert digest(first["heldout"]) == digest(other["heldout"])
    assert digest(first["evaluation_data"] / "documents.jsonl") == digest(other["evaluation_data"] / "documents.jsonl")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool_size": 1000}, "calibration.pool_size: expected 1000 x 4"),
        ({"heldout_sequences": 1000}, "calibration.heldout_sequences"),
        ({"sequence_length": 100_000}, "0 of at least 100000"),
    ],
)
def test_step_refuses_what_the_corpus_cannot_give(changes, reason, model, corpus, tmp_path):
    with pytest.raises(InputError, match=reason):
        sample(model, corpus, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_step_needs_evaluation_documents(model, corpus, tmp_path):
    splits = split_documents(read_documents(corpus / "documents.jsonl"))
    (tmp_path / "corpus").mkdir()
    write_documents(tmp_path / "corpus" / "documents.jsonl", splits["calibration"] + splits["heldout"])
    with pytest.raises(InputError, match="evaluation split"):
        sample(model, tmp_path / "corpus", tmp_path / "out")


def test_step_needs_a_bos_token_to_add(model, corpus, tmp_path):
    from transformers import AutoTokenizer

    other = tmp_path / "model"
    other.mkdir()
    (other / "config.json").write_text((model / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="add_bos: expected a tokenizer with a BOS"):
        sample(other, corpus, tmp_path / "out", add_bos=True)


def test_a_decoder_only_model_reads_the_text_itself(model, corpus, tmp_path):
    """Byte for byte: a pool that other files have named by its digest must stay the same."""
    outputs = sample(model, corpus, tmp_path)
    documents = split_documents(read_documents(corpus / "documents.jsonl"))["calibration"]
    settings = {"batches": 3, "sequences": 4, "length": 16, "order": "calibration 0", "names": NAMES}
    pool = draw(documents, Encoder.of_model(model, False), **settings)
    metadata = {"documents": json.dumps(pool.documents, ensure_ascii=False)}
    assert outputs["candidates"].read_bytes() == save({"input_ids": pool.input_ids}, metadata)


@pytest.mark.parametrize(("sentinels", "kind"), [(100, SPANS), (0, HALVES)])
def test_an_encoder_decoder_reads_sources_and_targets(sentinels, kind, corpus, tmp_path):
    model = tiny_t5(tmp_path / "model", sentinels=sentinels)
    first = sample(model, corpus, tmp_path / "a", sequence_length=40)
    # 6 of 40 tokens leave in 2 spans; 5 of 32 in 2
    shapes = {
        SPANS: [((3, 4, 37), (3, 4, 9)), ((2, 30), (2, 8))],
        HALVES: [((3, 4, 21), (3, 4, 21)), ((2, 17), (2, 17))],
    }
    for name, (source, target) in zip(("candidates", "heldout"), shapes[kind], strict=True):
        tensors = load_file(first[name])
        assert {key: tensor.shape for key, tensor in tensors.items()} == {
            "input_ids": source,
            "decoder_input_ids": target,
        }
        assert (tensors["input_ids"][..., -1] == 1).all()
        assert (tensors["decoder_input_ids"][..., 0] == 0).all()
    again = sample(model, corpus, tmp_path / "b", sequence_length=40)
    seeded = sample(model, corpus, tmp_path / "c", sequence_length=40, seed=1)
    fewer = sample(model, corpus, tmp_path / "d", sequence_length=40, pool_size=2)
    assert digest(first["candidates"]) == digest(again["candidates"]) != digest(seeded["candidates"])
    assert digest(first["heldout"]) == digest(seeded["heldout"])
    for name, tensor in load_file(fewer["candidates"]).items():
        assert (load_file(first["candidates"])[name][:2] == tensor).all()


def test_pairs_are_made_of_the_text_that_was_drawn(corpus, tmp_path):
    model = tiny_t5(tmp_path / "model")
    outputs = sample(model, corpus, tmp_path / "out", sequence_length=40)
    documents = split_documents(read_documents(corpus / "documents.jsonl"))["calibration"]
    encoder = Encoder.of_model(model, False)
    settings = {"batches": 3, "sequences": 4, "length": 40, "order": "calibration 0", "names": NAMES}
    text = draw(documents, encoder, **settings).input_ids
    sentinels = tuple(encoder.tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)]))
    pairs = PairMaker(sentinels, eos=1, start=0)(text[2], "calibration 0")
    tensors = load_file(outputs["candidates"])
    assert (tensors["input_ids"][2] == pairs.input_ids).all()
    assert (tensors["decoder_input_ids"][2] == pairs.decoder_input_ids).all()


def test_an_encoder_decoder_with_too_few_sentinels_leaves_nothing(corpus, tmp_path):
    model = tiny_t5(tmp_path / "model", sentinels=2)
    with pytest.raises(InputError, match="2 sentinel tokens"):
        sample(model, corpus, tmp_path / "out", heldout_length=100)
    assert not (tmp_path / "out").exists()


def test_compensation_fits_on_calibration_documents_only(model, corpus, tmp_path):
    outputs = sample(model, corpus, tmp_path / "out", method="least_squares")
    with safe_open(outputs["compensation_corpus"], "numpy") as file:
        assert file.get_tensor("input_ids").shape == (5, 16)
        (documents,) = json.loads(file.metadata()["documents"])
    splits = split_documents(read_documents(corpus / "documents.jsonl"))
    assert set(documents) <= {document.id for document in splits["calibration"]}
    without = sample(model, corpus, tmp_path / "none")
    with safe_open(without["compensation_corpus"], "numpy") as file:
        assert file.get_tensor("input_ids").shape == (0, 16)
    assert digest(without["candidates"]) == digest(outputs["candidates"])


def test_some_sequences_say_a_thing_twice(model, corpus, tmp_path):
    """Of the candidates and of what compensation fits on; what judges stays as it was written."""
    plain = sample(model, corpus, tmp_path / "plain", method="least_squares")
    outputs = sample(model, corpus, tmp_path / "out", method="least_squares", repeated=0.5)
    for name, rows in (("candidates", [1, 3]), ("compensation_corpus", [1, 3])):
        before, after = (load_file(each[name])["input_ids"] for each in (plain, outputs))
        assert before.shape == after.shape
        twice = (after[..., 9:] == after[..., 1:8]).all(axis=-1).reshape(-1, after.shape[-2])
        assert all(np.flatnonzero(batch).tolist() == rows for batch in twice)
        assert (before[..., :9] == after[..., :9]).all()
    assert digest(plain["heldout"]) == digest(outputs["heldout"])
    assert digest(plain["evaluation_data"] / "documents.jsonl") == digest(
        outputs["evaluation_data"] / "documents.jsonl"
    )
