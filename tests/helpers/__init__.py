"""Shared parts of the tests: toy models, files in published layouts, reference loops."""
