"""Conversion of published annotations to the layouts that clipdense reads, for `datasets/prepare_*.py`.

Existing files are kept and new ones are written atomically, so that an interrupted conversion can be resumed.
"""
