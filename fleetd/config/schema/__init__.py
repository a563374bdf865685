"""The schema of fleet.yaml."""
