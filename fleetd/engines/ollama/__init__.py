"""The Ollama engine."""
