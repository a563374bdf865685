"""Importers of other programs' files: each returns parts of fleet.yaml and a report of lost fields."""
