"""`python -m flows.alignment`: another name of `python -m flows.study alignment`."""

from flows.study import main

if __name__ == "__main__":
    main("alignment")
