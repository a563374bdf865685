"""Decisions about requests: admission, the queue and routing."""
