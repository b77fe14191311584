"""`python -m flows.families`: another name of `python -m flows.study families`."""

from flows.study import main

if __name__ == "__main__":
    main("families")
