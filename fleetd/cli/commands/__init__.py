"""The commands of fleetctl, one file per group."""
