"""Decisions about models: what to load, evict, put to sleep, and the memory ledger."""
