/*
 * System calls on open files that Python has no function for, and many reads in one call.
 */
#include <sys/uio.h>

#define URING_RWF_NOWAIT 8 /* Linux 4.14 */

/* Read count parts of a file one after the other into memory, without waiting. A result is the
 * number of bytes read, or a negative errno: -EAGAIN if the read would have to wait. */
static void read_many_cached(int fd, char *memory, const uint32_t *sizes, const int64_t *offsets,
                             int32_t *results, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        struct iovec vector = {memory, sizes[i]};
        ssize_t result = preadv2(fd, &vector, 1, offsets[i], URING_RWF_NOWAIT);
        results[i] = result < 0 ? -errno : (int32_t)result;
        memory += sizes[i];
    }
}

/* As fallocate(2) and sync_file_range(2), for threads. Python runs them without its lock. */
static int allocate_range(int fd, int mode, int64_t offset, int64_t size)
{
    return fallocate(fd, mode, offset, size) < 0 ? -errno : 0;
}

static int sync_range(int fd, int64_t offset, int64_t size, unsigned flags)
{
    return sync_file_range(fd, offset, size, flags) < 0 ? -errno : 0;
}
