"""The top floor: config assembly, set-up from weights, prediction, tables of runs."""
