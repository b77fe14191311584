"""`python -m flows.modules`: another name of `python -m flows.study modules`."""

from flows.study import main

if __name__ == "__main__":
    main("modules")
