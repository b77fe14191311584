"""`python -m flows.gamma_sweep`: another name of `python -m flows.study gamma_sweep`."""

from flows.study import main

if __name__ == "__main__":
    main("gamma_sweep")
