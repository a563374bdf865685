"""The importer of llama-swap's configuration."""
