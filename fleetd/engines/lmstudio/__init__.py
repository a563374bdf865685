"""The LM Studio engine."""
