"""The socket a reward server listens on."""

from __future__ import annotations

import socket

from reward_servers.process import bind


def test_connections_send_an_answer_without_waiting_for_acknowledgements() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
