"""Config assembly, set-up from weights, prediction, conversion and tables of runs."""
