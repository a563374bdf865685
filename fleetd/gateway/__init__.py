"""The data plane: an HTTP/1.1 proxy that knows models. `Gateway(port, options)` is all that the daemon needs.

    client ── http1.ServerConnection ── routes ── proxy.Exchange ── upstream.UpstreamConnection ── engine
                        │                               │
                     policy                     port.FleetPort (the daemon)

The rules of this package
- Everything runs on the loop's thread in plain callbacks; no task and no future per request.
- llhttp parses both sides; nothing here parses HTTP.
- The only thing it knows of the fleet is `FleetPort`.
"""

from fleetd.gateway.listener import Gateway, GatewayStats
from fleetd.gateway.options import GatewayOptions
from fleetd.gateway.port import FleetPort, ModelEntry, Seat, Upstream

__all__ = ["FleetPort", "Gateway", "GatewayOptions", "GatewayStats", "ModelEntry", "Seat", "Upstream"]
