"""Text output of `fleetctl`, by what it shows.

Invariants:
- Every view is rendered from documents of `fleetd.control.wire`; a key that an older daemon does not send is shown as `-`.
"""
