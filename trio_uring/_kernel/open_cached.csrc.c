/* ---- Opening what is cached -------------------------------------------------------------
 *
 * What the kernel does with an IORING_OP_OPENAT as it takes the SQE: open without waiting, if
 * all that is on the path is in its cache. Called directly, that needs no turn of the loop.
 * The caller sends what is refused, for whatever reason, through the ring.
 */
#include <fcntl.h>

/* From linux/openat2.h: Linux 5.6, and 5.12 for RESOLVE_CACHED. */
#define URING_RESOLVE_CACHED 0x20
struct uring_open_how { uint64_t flags, mode, resolve; };
#ifndef __NR_openat2
#define __NR_openat2 437 /* the same on every architecture */
#endif

/* O_NONBLOCK keeps the open of a FIFO, or of a file with a lease, from waiting. With O_PATH
 * nothing waits. */
static int open_cached(const char *path, int flags)
{
    int nonblock = flags & O_PATH ? 0 : O_NONBLOCK;
    struct uring_open_how how = {.flags = (uint64_t)(flags | nonblock | O_CLOEXEC),
                                 .resolve = URING_RESOLVE_CACHED};
    int fd = (int)syscall(__NR_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd < 0)
        return -errno;
    if (nonblock & ~flags)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    return fd;
}
