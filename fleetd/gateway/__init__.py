"""The data plane: an HTTP/1.1 proxy that knows models. The daemon uses `Gateway(fleet, options)`.

    client ── http1.ServerConnection ── handlers ── proxy.Exchange ── upstream.UpstreamConnection ── engine
                        │                                 │
                     checks                       port.FleetPort (the daemon)

Invariants:
- Everything runs on the loop's thread in plain callbacks; no task and no future per request, except to open a connection.
- llhttp parses both sides; nothing here parses HTTP.
- Everything the gateway knows of the fleet comes through `FleetPort`.
"""

from fleetd.gateway.listener import Gateway, GatewayStats
from fleetd.gateway.options import GatewayOptions
from fleetd.gateway.port import FleetPort, ModelEntry
from fleetd.gateway.target import ModelTarget, Upstream

__all__ = ["FleetPort", "Gateway", "GatewayOptions", "GatewayStats", "ModelEntry", "ModelTarget", "Upstream"]
