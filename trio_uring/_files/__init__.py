"""Files and paths on the ring, through Trio's own API and the package's."""

from ._async_file import ARGUMENTS as ARGUMENTS, async_file_method as async_file_method
from ._bridge import current_files as current_files
from ._directories import ReadAhead as ReadAhead
from ._hits import OTHERWISE as OTHERWISE
from ._hooks import (
    file_aclose as file_aclose,
    file_getattr as file_getattr,
    run_sync as run_sync,
)
from ._quick import (
    call_path as call_path,
    quick_call as quick_call,
    result_of as result_of,
)
from ._routes import route as route
from ._sync import fdatasync as fdatasync, fsync as fsync
