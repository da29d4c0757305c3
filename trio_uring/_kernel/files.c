/* System calls on open files that Python has no function for. */
#include "preadv2.h"

#ifndef __NR_cachestat
#define __NR_cachestat 451 /* Linux 6.5; the same on every architecture */
#endif

/* As fallocate(2) and sync_file_range(2), for threads. */
static int allocate_range(int fd, int mode, int64_t offset, int64_t size)
{
    return fallocate(fd, mode, offset, size) < 0 ? -errno : 0;
}

static int sync_range(int fd, int64_t offset, int64_t size, unsigned flags)
{
    return sync_file_range(fd, offset, size, flags) < 0 ? -errno : 0;
}

/* Whether size bytes of a file, from offset on, can be read without waiting. cachestat(2) also counts
 * pages that are just being read from the disk. Most are read in order, so the last byte is asked for
 * as well. 0 if it is not known: before Linux 6.5, and beyond the end of the file. */
static int is_cached(int fd, uint64_t offset, uint64_t size)
{
    struct { uint64_t offset, size; } range = {offset, size};
    struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } found;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    char last;
    return size > 0 && syscall(__NR_cachestat, fd, &range, &found, 0) == 0 &&
           found.cached >= (offset + size - 1) / page - offset / page + 1 &&
           read_with_flags(fd, &last, 1, (int64_t)(offset + size - 1), URING_RWF_NOWAIT) == 1;
}
