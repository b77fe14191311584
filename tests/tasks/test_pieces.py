"""Cutting by content, so that copies are cut alike, and joining of what is too short."""

import io
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.documents import Document
from tasks.corpus.pieces import Cutting, cut_documents, join_short, piece_size, pieces, pieces_of_file


def squeezed(text):
    return "".join(text.split())


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab .\n。é", min_size=1, max_size=400), st.integers(10, 60))
def test_nothing_but_white_space_is_lost_and_a_file_is_cut_alike(text, size):
    made = pieces(text, size)
    assert squeezed("".join(made)) == squeezed(text)
    assert all(len(piece) <= size for piece in made)
    if len(text) > size:
        assert list(pieces_of_file(io.StringIO(text, newline=""), Cutting(size, size))) == made


def test_cuts_are_where_the_best_separators_are():
    paragraph = "One sentence of some words. Another one\nin two lines."
    assert set(pieces("\n\n".join([paragraph] * 9), 100)) == {paragraph}
    assert all(piece.endswith(".") for piece in pieces("A sentence of words. " * 50, 100))
    assert all(piece.endswith("。") for piece in pieces("農民は鉄道を作った。" * 50, 100))
    assert "".join(pieces("x" * 1000, 100)) == "x" * 1000


def test_copies_with_another_title_page_are_cut_into_the_same_pieces():
    generator = random.Random(0)
    text = " ".join("".join(generator.choices("abcdef", k=5)) for _ in range(20_000))
    one, other = (set(pieces(before + text, 4000)) for before in ("", "A title page by another hand. "))
    assert len(one & other) >= len(one) - 3


def test_names_of_pieces():
    documents = [Document("a", "x y " * 30, 1), Document("b", "short", 1)]
    cutting = Cutting(100, 60)
    made = list(cut_documents(documents, cutting))
    assert [document.id for document in made] == ["a:00000", "a:00001", "a:00002", "b"]
    assert {document.source for document in made} == {1}
    assert cutting.cut == ["a"]


def test_piece_size():
    assert [piece_size(size) for size in (1000, 1_000_000, 100_000_000)] == [2048, 5000, 8192]


def test_short_neighbours_of_one_source_are_joined():
    texts = ["aa", "bbb", "c" * 9, "d", "e", "ffff", "g"]
    documents = [Document(text[0], text, int(text[0] in "fg")) for text in texts]
    made = join_short(documents, lambda document: len(document.text), 5)
    assert made == [
        Document("a+1", "aa\n\nbbb"),
        Document("c", "c" * 9),
        Document("d+1", "d\n\ne"),
        Document("f+1", "ffff\n\ng", 1),
    ]
