"""`python -m flows.quantised`: another name of `python -m flows.study quantised`."""

from flows.study import main

if __name__ == "__main__":
    main("quantised")
