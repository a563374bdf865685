"""Ollama's model stores."""
