"""The engine `external`: a server that fleetd does not start."""
