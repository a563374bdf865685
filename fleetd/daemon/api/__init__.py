"""What the control API and the gateway ask of the daemon."""
