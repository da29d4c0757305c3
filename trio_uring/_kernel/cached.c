/* Opens a path or gets its status without blocking, if the kernel has the whole path in its cache.
 *
 * The kernel tries the same first for an IORING_OP_OPENAT. Calling it directly needs no loop
 * iteration. On any error, the caller performs the operation on the ring.
 */
#include <fcntl.h>
#include <sys/stat.h>

#include "engine_api.h"
#include "preadv2.h"

/* From linux/openat2.h: Linux 5.6, and 5.12 for RESOLVE_CACHED. */
#define URING_RESOLVE_CACHED 0x20
struct uring_open_how { uint64_t flags, mode, resolve; };
#ifndef __NR_openat2
#define __NR_openat2 437 /* the same on every architecture */
#endif

/* From fcntl.h and linux/stat.h. */
#define URING_AT_EMPTY_PATH 0x1000
#define URING_AT_STATX_DONT_SYNC 0x4000
#define URING_STATX_BASIC_STATS 0x7ff
#define URING_STATX_MNT_ID_UNIQUE 0x4000 /* Linux 6.8 */
#define URING_STATX_SIZE 256

/* With O_NONBLOCK, opening a FIFO or a file with a lease does not block. With O_PATH it never
 * does. F_SETFL ignores those of the flags that only open(2) sets. */
static int open_cached(const char *path, int flags)
{
    int nonblock = flags & O_PATH ? 0 : O_NONBLOCK;
    struct uring_open_how how = {.flags = (uint64_t)(flags | nonblock | O_CLOEXEC),
                                 .resolve = URING_RESOLVE_CACHED};
    int fd = (int)syscall(__NR_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd < 0)
        return -errno;
    if (nonblock & ~flags)
        fcntl(fd, F_SETFL, flags);
    return fd;
}

/* Open a file that was in the cache a moment ago. */
static int open_at_once(const char *path, int flags)
{
    int fd = open_cached(path, flags);
    if (fd != -EAGAIN)
        return fd;
    fd = open(path, flags | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0)
        fcntl(fd, F_SETFL, flags);
    return fd < 0 ? -errno : fd;
}

/* The status of an open file, into the 256 bytes of a struct statx. A file system that would ask a
 * server does not: what it answers then may be out of date, but for the device and the mount. */
static int stat_fd(int fd, void *status)
{
#ifdef __NR_statx
    int how = URING_AT_EMPTY_PATH | URING_AT_STATX_DONT_SYNC;
    unsigned mask = URING_STATX_BASIC_STATS | URING_STATX_MNT_ID_UNIQUE;
    return (int)syscall(__NR_statx, fd, "", how, mask, status) < 0 ? -errno : 0;
#else
    return -ENOSYS;
#endif
}

/* Return 1 if a read or write of an open file can block indefinitely, because it is a pipe, socket,
 * terminal, eventfd, ...; 0 if it ends by itself, or if fd is not open. Asks no file server. */
static int can_block(int fd)
{
    char status[URING_STATX_SIZE];
    uint16_t mode;
    if (stat_fd(fd, status) < 0)
        return 0;
    memcpy(&mode, status + 0x1c, sizeof mode);
    int type = mode & S_IFMT;
    return type != S_IFREG && type != S_IFBLK && type != S_IFDIR;
}

/* Which mount a file is in: a number that is not used again after an unmount. Before Linux 6.8 that
 * of the device, which is. */
static uint64_t mount_in(const char *status)
{
    struct { uint32_t mask; } head;
    struct { uint32_t major, minor; uint64_t mount; } tail; /* from stx_dev_major on */
    memcpy(&head, status, sizeof head);
    memcpy(&tail, status + 0x88, sizeof tail);
    if (head.mask & URING_STATX_MNT_ID_UNIQUE)
        return tail.mount;
    return (uint64_t)1 << 63 | (uint64_t)tail.major << 32 | tail.minor;
}

/* 0 if it cannot be known. */
static uint64_t mount_of(int fd)
{
    char status[URING_STATX_SIZE];
    return stat_fd(fd, status) < 0 ? 0 : mount_in(status);
}

/* Mounts that are known to need no server. Any thread may add one; at most one is forgotten then. */
static uint64_t without_server[32];
static unsigned without_server_next;
#define WITHOUT_SERVER_MAX (sizeof without_server / sizeof *without_server)

static int is_without_server(uint64_t mount)
{
    for (unsigned i = 0; i < WITHOUT_SERVER_MAX; i++)
        if (__atomic_load_n(&without_server[i], __ATOMIC_RELAXED) == mount)
            return mount != 0;
    return 0;
}

static void note_without_server(uint64_t mount)
{
    if (is_without_server(mount))
        return;
    unsigned next = __atomic_fetch_add(&without_server_next, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&without_server[next % WITHOUT_SERVER_MAX], mount, __ATOMIC_RELAXED);
}

static int opens_without_server(const char *path)
{
    int fd = open_cached(path, O_PATH);
    if (fd < 0)
        return fd;
    uint64_t mount = mount_of(fd);
    close(fd);
    return is_without_server(mount);
}

/* Whether the file at path is in a mount that is known to need no server. For a file that does not
 * exist, or is not in the cache, the directory says: to open that, a worker is needed anyway. */
static int path_is_without_server(const char *path)
{
    char directory[4096];
    int result = opens_without_server(path);
    const char *slash = strrchr(path, '/');
    size_t size = slash ? (size_t)(slash - path) + 1 : 0;
    if ((result == -EAGAIN || result == -ENOENT) && size < sizeof directory) {
        memcpy(directory, path, size);
        directory[size] = 0;
        result = opens_without_server(size ? directory : ".");
    }
    return result > 0;
}

/* Open what is at path with O_PATH, in such a mount. flags are those of open(2) that say which file.
 * -ENOENT and -ENOTDIR are certain: the kernel's cache also knows which names do not exist. */
static int find_cached(const char *path, int flags)
{
    int fd = open_cached(path, flags | O_PATH);
    if (fd >= 0 && !is_without_server(mount_of(fd))) {
        close(fd);
        return -EXDEV;
    }
    return fd;
}

/* Find what is at path, in such a mount. */
static int look_up_cached(const char *path, int flags, struct found *found)
{
    char status[URING_STATX_SIZE];
    int fd = open_cached(path, flags | O_PATH);
    if (fd < 0)
        return fd;
    int result = stat_fd(fd, status);
    close(fd);
    if (result < 0)
        return result;
    found->mount = mount_in(status);
    memcpy(&found->mode, status + 0x1c, sizeof found->mode);
    memcpy(&found->size, status + 0x28, sizeof found->size);
    return is_without_server(found->mount) ? 0 : -EXDEV;
}

/* Return the mode of what is at path, in such a mount; -EFBIG if it is larger than size_max. */
static int mode_cached(const char *path, int flags, uint64_t size_max)
{
    struct found found;
    int result = look_up_cached(path, flags, &found);
    if (result < 0)
        return result;
    return found.size > size_max ? -EFBIG : found.mode;
}

/* Read a regular file that look_up_cached() has found, with the size that it had, without waiting for
 * a disk. Return the size, which is smaller if the file has become so; -EAGAIN if it has grown, or if
 * something else is unusual. */
static long read_found(const char *path, char *memory, size_t size)
{
    int fd = open_cached(path, O_RDONLY | O_NONBLOCK);
    if (fd < 0)
        return -EAGAIN;
    char more;
    struct iovec parts[] = {{memory, size}, {&more, 1}};
    long done = read_parts(fd, parts, 2, 0, URING_RWF_NOWAIT);
    /* If it has the size that it had, it ended there a moment ago. */
    if (done != (long)size && (done < 0 || done > (long)size ||
                               read_with_flags(fd, &more, 1, done, URING_RWF_NOWAIT) != 0))
        done = -EAGAIN;
    close(fd);
    return done;
}

/* Open a regular file that mode_cached() has found, and read it without waiting for a disk. Returns
 * how many bytes were read. If there may be more, *rest is set to the fd. */
static int read_cached(const char *path, char *buffer, int size, int *rest)
{
    int fd = open_at_once(path, O_RDONLY | O_NONBLOCK), done = 0;
    *rest = -1;
    while (fd >= 0) {
        long count =
            read_with_flags(fd, buffer + done, (size_t)(size - done), done, URING_RWF_NOWAIT);
        if (count == 0) {
            close(fd);
            return done;
        }
        done += count > 0 ? (int)count : 0;
        if (count < 0 || done == size) {
            fcntl(fd, F_SETFL, O_RDONLY);
            *rest = fd;
            return done;
        }
    }
    return fd;
}
