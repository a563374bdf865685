"""From configuration, engines and the machine to the desired state, without a running daemon."""
