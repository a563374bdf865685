"""Readers of other programs' files: each gives parts of fleet.yaml and a report of what could not be carried over."""
