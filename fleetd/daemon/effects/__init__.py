"""Carry out the commands of the core."""
