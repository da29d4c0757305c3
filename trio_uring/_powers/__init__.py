"""What io_uring can do and no readiness loop can."""

from ._batch import perform_many as perform_many
