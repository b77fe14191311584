"""The calibration study: how much the calibration text decides."""
