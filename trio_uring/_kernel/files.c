/* System calls on open files that Python has no function for. */

/* As fallocate(2) and sync_file_range(2), for threads. */
static int allocate_range(int fd, int mode, int64_t offset, int64_t size)
{
    return fallocate(fd, mode, offset, size) < 0 ? -errno : 0;
}

static int sync_range(int fd, int64_t offset, int64_t size, unsigned flags)
{
    return sync_file_range(fd, offset, size, flags) < 0 ? -errno : 0;
}
