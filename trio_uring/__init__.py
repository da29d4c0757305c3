"""Trio on Linux's io_uring.

The public names: `run`, `start_guest_run`, `install` and `uninstall` decide which Trio runs
get a ring, `RingConfig` and `SQPoll` how it is set up. `trio_uring.lowlevel` has the
operations themselves.
"""

from ._config import RingConfig as RingConfig
from ._config import SQPoll as SQPoll
from ._errors import ForkedRingError as ForkedRingError
from ._errors import IncompatibleTrioError as IncompatibleTrioError
from ._errors import RingUnavailableError as RingUnavailableError
from ._errors import UnsupportedOpcodeError as UnsupportedOpcodeError
from ._run import install as install
from ._run import run as run
from ._run import start_guest_run as start_guest_run
from ._run import uninstall as uninstall
