"""`python -m flows.calibration_study`: another name of `python -m flows.study calibration_study`."""

from flows.study import main

if __name__ == "__main__":
    main("calibration_study")
