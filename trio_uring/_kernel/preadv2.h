/* preadv2(2). musl has no function for it before 1.2.5. */
#ifndef TRIO_URING_PREADV2_H
#define TRIO_URING_PREADV2_H

#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define URING_RWF_NOWAIT 8 /* Linux 4.14 */

/* offset is -1 for the file's position, which moves. The kernel joins the halves of the offset; on
 * machines of 64 bits the first one is all of it. */
static inline long read_parts(int fd, const struct iovec *parts, int count, int64_t offset, int flags)
{
    return syscall(__NR_preadv2, (long)fd, parts, (long)count, (long)offset, (long)(offset >> 32),
                   flags);
}

static inline long read_with_flags(int fd, void *memory, size_t size, int64_t offset, int flags)
{
    struct iovec part = {memory, size};
    return read_parts(fd, &part, 1, offset, flags);
}

#endif
