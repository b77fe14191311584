"""`python -m flows.compare`: another name of `python -m flows.study compare`."""

from flows.study import main

if __name__ == "__main__":
    main("compare")
