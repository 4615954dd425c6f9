"""uvicorn's server, which ends within seconds whatever its clients do.

At the first signal no more requests are taken, and open streams have `GRACE` seconds to end by themselves; a second
signal, or the end of that time, ends their texts, so that the streams end as any other. A client that does not read is
cut off `GRACE` seconds later.
"""

import asyncio
from types import FrameType

import uvicorn

from . import Service

GRACE = 3  # seconds


class Server(uvicorn.Server):
    """As uvicorn's, which cancels the tasks of open streams and at a second Ctrl-C leaves threads to Python's end."""

    def __init__(self, service: Service, host: str, port: int) -> None:
        super().__init__(uvicorn.Config(service.app, host=host, port=port, timeout_graceful_shutdown=2 * GRACE))
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            super().handle_exit(sig, frame)
        else:
            asyncio.get_running_loop().call_soon_threadsafe(self.service.app.end_all)

    async def shutdown(self, sockets: list | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE, self.service.app.end_all)
        await super().shutdown(sockets)
