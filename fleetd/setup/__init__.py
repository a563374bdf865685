"""Look at a machine for a person: `init` proposes a fleet.yaml, `doctor` finds what keeps a fleet from running."""
