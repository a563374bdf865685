"""The gateway's limits and timeouts, all in one value. Every wait has an end here, and every buffer a size.

The rules of this file
- Durations are seconds (`_s`), sizes are bytes (`_bytes`). The defaults are meant for a machine in daily use.
- The daemon fills what fleet.yaml states (`gateway.*`); the rest stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What one gateway accepts and how long it waits.

    `host` and `port` are the listen address (port 0: any free one). `allowed_hosts` are names that a Host header may
    carry beside localhost and the listen address: a name, `*.name` for its sub-domains, or `*` for every name.
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
    max_connections_per_client: int = 4096  # by address; the idlest of the same client give way
    backlog: int = 1024

    head_timeout_s: float = 10.0  # from the first byte of a request to the end of its headers
    body_idle_timeout_s: float = 30.0  # between two pieces of a request's body
    keepalive_timeout_s: float = 75.0  # between two requests
    write_timeout_s: float = 30.0  # a reader that takes nothing for this long is cut off
    linger_s: float = 2.0  # after an early refusal, so that the client can read it

    connect_timeout_s: float = 5.0
    unreachable_s: float = 30.0  # a request that no engine takes a connection for goes on asking the fleet for so long
    first_byte_timeout_s: float = 600.0  # a long answer that is not streamed comes as one piece
    idle_timeout_s: float = 300.0  # between two pieces of an answer
    upstream_keepalive_s: float = 4.0  # vLLM's server closes after 5 s
    max_idle_per_upstream: int = 256
    retry_attempts: int = 2  # tries in all, and only while nothing was received

    loading_comment_s: float = 5.0  # a stream that waits is told so in this rhythm
    tick_s: float = 0.25  # the grain of all timeouts above
