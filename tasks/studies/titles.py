"""How methods are written for a reader, and from when a row is marked as of another size than it was asked for."""

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


def titled(method: str) -> str:
    """Return how a method is written for a reader."""
    return TITLES.get(method, method.replace("_", " "))
