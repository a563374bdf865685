"""fleetd: one daemon for a fleet of local language models."""

__version__ = "0.1.0"
