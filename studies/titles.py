"""How methods and their standing are written for a reader, and from when a row is marked as of another size."""

from collections.abc import Mapping

from studies.bootstrap import Interval

TITLES = {
    "nirvana": "NIRVANA",
    "fisher": "mask Fisher",
    "flap": "FLAP",
    "llm_pruner": "LLM-Pruner",
    "wanda_sp": "Wanda-sp",
    "shortgpt": "ShortGPT",
    "slicegpt": "SliceGPT",
    "lm_loss": "LM loss",
}
BUDGET_SLACK = 0.005
"""A row further from the ratio asked for is marked: it is of another size than those that it stands beside."""


def standing(above: Mapping[str, Interval]) -> str:
    """Say of a reference how many others it is surely better than, and name the rest.

    Args:
        above: By name, how much worse another is than the reference.
    """
    text = f"surely better (95 %) than {sum(each.low > 0 for each in above.values())} of {len(above)} others"
    unsure = [name for name, each in above.items() if each.low <= 0 <= each.high]
    better = [name for name, each in above.items() if each.high < 0]
    text += f", not surely apart from {', '.join(unsure)}" if unsure else ""
    return text + (f", surely worse than {', '.join(better)}" if better else "")


def titled(method: str) -> str:
    """Return how a method is written for a reader."""
    return TITLES.get(method, method.replace("_", " "))
