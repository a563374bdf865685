"""Read, check and apply a changed configuration."""
