"""Helpers of the tests and benchmarks: rank pools, tolerances per dtype, the timer and its CSV."""
