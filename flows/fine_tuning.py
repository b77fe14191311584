"""`python -m flows.fine_tuning`: another name of `python -m flows.study fine_tuning`."""

from flows.study import main

if __name__ == "__main__":
    main("fine_tuning")
