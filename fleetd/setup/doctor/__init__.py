"""`fleetctl doctor`: facts of the machine go in, findings with a command that helps come out."""
