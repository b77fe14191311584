"""`python -m flows.attention_factor`: another name of `python -m flows.study attention_factor`."""

from flows.study import main

if __name__ == "__main__":
    main("attention_factor")
