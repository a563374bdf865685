"""Checks beyond single values, and messages for each mistake."""
