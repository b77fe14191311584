"""What is typed on a study's command line, and what it comes to."""

import pytest

from flows.options import names, numbers, ways
from nirvana.errors import InputError


def test_names_count_once_and_spaces_do_not():
    assert names("flap, nirvana,flap") == ("flap", "nirvana")


def test_a_way_is_a_method_and_what_makes_up_for_it():
    assert ways("nirvana, flap+bias,best,fisher+least_squares") == (
        ("nirvana", "none"),
        ("flap", "bias"),
        ("fisher", "least_squares"),
    )


def test_numbers_have_a_range():
    assert numbers("--ratios", "0.2, 0.4,0.2") == (0.2, 0.4)
    assert numbers("--gammas", "2,8", below=100) == (2.0, 8.0)


@pytest.mark.parametrize("text", ["", "0.2,", "a", "0", "1", "-0.2", "nan"])
def test_other_numbers_are_refused(text):
    with pytest.raises(InputError, match=r"--ratios: expected numbers between 0 and 1 such as 0\.2,0\.4"):
        numbers("--ratios", text)
