"""Harness that damages inputs, kills processes and fills disks; see ``__main__.py``."""
