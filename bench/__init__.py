"""Measurements, one command each, and the demonstration."""
