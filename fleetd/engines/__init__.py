"""Engines: the programs that serve models, one folder each."""
