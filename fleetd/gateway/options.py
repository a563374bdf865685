"""Limits and timeouts of the gateway in one value: every wait ends, every buffer is bounded.

Durations are in seconds (`_s`), sizes in bytes (`_bytes`). The daemon sets what fleet.yaml states under `gateway`.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """The limits and timeouts of one gateway.

    `host` and `port` are the listen address (port 0: any free one). `allowed_hosts` are further names that a Host header may
    carry, besides localhost and the listen address: a name, `*.name` for its sub-domains, or `*` for every name.
    """

    host: str = "127.0.0.1"
    port: int = 8484
    allowed_hosts: tuple[str, ...] = ()

    max_body_bytes: int = 64 * MIB
    max_buffered_bytes: int = 512 * MIB  # request bodies of all connections together
    max_head_bytes: int = 64 * KIB
    max_target_bytes: int = 8 * KIB
    max_headers: int = 128
    max_pipelined: int = 16

    max_connections: int = 8192
    max_connections_per_client: int = 4096  # by address; a new one replaces those idle longest
    backlog: int = 1024

    head_timeout_s: float = 10.0  # from the first byte of a request to the end of its headers
    body_idle_timeout_s: float = 30.0  # between two pieces of a request's body
    keepalive_timeout_s: float = 75.0  # between two requests
    write_timeout_s: float = 30.0  # a client that reads nothing for this long is cut off
    linger_s: float = 2.0  # after an early error, so that the client can read it

    connect_timeout_s: float = 5.0
    unreachable_s: float = 30.0  # how long an unreachable engine is retried through the fleet
    first_byte_timeout_s: float = 600.0  # a long answer that is not streamed arrives as one piece
    idle_timeout_s: float = 300.0  # between two pieces of an answer
    upstream_keepalive_s: float = 4.0  # vLLM's server closes after 5 s
    max_idle_per_upstream: int = 256
    retry_attempts: int = 2  # deliveries in all, and only while nothing was received

    loading_comment_s: float = 5.0  # period of the comments to a stream that waits
    tick_s: float = 0.25  # the precision of all timeouts above
