"""Files and paths on the ring, through Trio's own API."""

from ._positional import PositionalFile as PositionalFile, open_positional as open_positional
from ._routes import count_thread as count_thread, route as route
from ._seams import (
    file_aclose as file_aclose,
    file_getattr as file_getattr,
    run_sync as run_sync,
)
