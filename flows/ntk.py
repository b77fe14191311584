"""`python -m flows.ntk`: another name of `python -m flows.study ntk`."""

from flows.study import main

if __name__ == "__main__":
    main("ntk")
