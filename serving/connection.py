"""An HTTP connection of uvicorn that is cut off when its client does nothing.

uvicorn waits without a limit for a client that sends no request, or does not read its answer, and
refuses all others once too many connections are open.
"""

from asyncio import Transport

from uvicorn.protocols.http.h11_impl import H11Protocol

CHECK_SECONDS = 30


class Connection(H11Protocol):
    """Is cut off if nothing has changed between two checks, and the server is not at work for it.
    """

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self.check_later()

    def check_later(self) -> None:
        known = self.cycle, self.transport.get_write_buffer_size()
        self.next_check = self.loop.call_later(CHECK_SECONDS, self.check, *known)

    def check(self, known_request: object, known_unread: int) -> None:
        request, unread = self.cycle, self.transport.get_write_buffer_size()
        is_at_work = bool(request) and not request.response_complete and not unread
        if is_at_work or (request, unread) != (known_request, known_unread):
            self.check_later()
        else:
            # To close it would wait until the rest has been read.
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.next_check.cancel()
        super().connection_lost(error)
