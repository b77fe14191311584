"""`python -m flows.zero_shot`: another name of `python -m flows.study zero_shot`."""

from flows.study import main

if __name__ == "__main__":
    main("zero_shot")
