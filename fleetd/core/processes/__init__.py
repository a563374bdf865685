"""Decisions about processes: when to start, restart, drain and stop."""
