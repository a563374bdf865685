"""Measurements, each one command, side by side with what they name; and the demonstration."""
