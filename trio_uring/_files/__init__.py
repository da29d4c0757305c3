"""Files and paths on the ring, through Trio's own API and the package's."""

from ._async_file import ARGUMENTS as ARGUMENTS, async_file_method as async_file_method
from ._bridge import current_files as current_files
from ._direct import DirectFile as DirectFile, open_direct as open_direct
from ._directories import ReadAhead as ReadAhead
from ._hits import OTHERWISE as OTHERWISE
from ._hooks import (
    file_aclose as file_aclose,
    file_getattr as file_getattr,
    run_sync as run_sync,
)
from ._open_fd import FallocateMode as FallocateMode
from ._open_positional import open_positional as open_positional
from ._positional import PositionalFile as PositionalFile
from ._quick import quick_call as quick_call
from ._registered_buffers import (
    BufferLease as BufferLease,
    RegisteredBuffers as RegisteredBuffers,
)
from ._routes import route as route
from ._sync import fdatasync as fdatasync, fsync as fsync
from ._write_file import write_file as write_file
