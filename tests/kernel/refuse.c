/*
 * Preloaded into a child, this stands before libc's syscall() and lets io_uring's calls fail as
 * older kernels, limits and filters do, and reads as other programs can make them. What fails stands
 * in the environment:
 *
 *   REFUSE_FLAGS=mask       io_uring_setup with one of these flags: EINVAL
 *   REFUSE_ABOVE=entries    io_uring_setup with more entries: ENOMEM
 *   REFUSE_SETUP=errno      io_uring_setup, always
 *   REFUSE_FEATURES=mask    io_uring_setup succeeds, without these features
 *   REFUSE_ENTER=errno      io_uring_enter, always
 *   REFUSE_ENTERS=n:errno   io_uring_enter, each n-th call
 *   REFUSE_REGISTER=op:errno,op:errno,...
 *   REFUSE_READS=errno      preadv2, always
 *   REFUSE_BEYOND=size      preadv2 reads no more than these bytes at a time
 *   REFUSE_SIZE=size        statx of an open regular file says this size
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

enum { SETUP = 425, ENTER = 426, REGISTER = 427 };
enum { MODE = 0x1c, SIZE = 0x28 }; /* where they are in a struct statx */

static unsigned long number_in(const char *name)
{
    const char *value = getenv(name);
    return value == NULL ? 0 : strtoul(value, NULL, 0);
}

static int refuse_setup(unsigned entries, const unsigned *params)
{
    unsigned flags = params[2];
    if (flags & number_in("REFUSE_FLAGS"))
        return EINVAL;
    if (getenv("REFUSE_ABOVE") != NULL && entries > number_in("REFUSE_ABOVE"))
        return ENOMEM;
    return (int)number_in("REFUSE_SETUP");
}

static int refuse_enter(void)
{
    static unsigned calls;
    const char *some = getenv("REFUSE_ENTERS");
    int every, error;
    if (some != NULL && sscanf(some, "%d:%d", &every, &error) == 2 && ++calls % every == 0)
        return error;
    return (int)number_in("REFUSE_ENTER");
}

static int refuse_register(unsigned opcode)
{
    const char *list = getenv("REFUSE_REGISTER");
    unsigned refused;
    int error, length;
    while (list != NULL && sscanf(list, "%u:%d%n", &refused, &error, &length) == 2) {
        if (refused == opcode)
            return error;
        list += length;
        if (*list == ',')
            list++;
    }
    return 0;
}

/* The arguments of preadv2: the fd, the parts, their number, ... */
static void shorten_read(long *arguments, struct iovec *part)
{
    *part = *(const struct iovec *)arguments[1];
    unsigned long size = number_in("REFUSE_BEYOND");
    if (size > part->iov_len)
        return;
    part->iov_len = size;
    arguments[1] = (long)part;
    arguments[2] = 1;
}

static void replace_size(char *status)
{
    unsigned short mode;
    unsigned long long size = number_in("REFUSE_SIZE");
    memcpy(&mode, status + MODE, sizeof mode);
    if (S_ISREG(mode))
        memcpy(status + SIZE, &size, sizeof size);
}

long syscall(long number, ...)
{
    static long (*real)(long, ...);
    long arguments[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        arguments[i] = va_arg(list, long);
    va_end(list);

    int error = 0;
    if (number == SETUP)
        error = refuse_setup((unsigned)arguments[0], (const unsigned *)arguments[1]);
    else if (number == ENTER)
        error = refuse_enter();
    else if (number == REGISTER)
        error = refuse_register((unsigned)arguments[1]);
    else if (number == SYS_preadv2)
        error = (int)number_in("REFUSE_READS");
    if (error != 0) {
        errno = error;
        return -1;
    }
    if (real == NULL)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    struct iovec part;
    if (number == SYS_preadv2 && getenv("REFUSE_BEYOND") != NULL)
        shorten_read(arguments, &part);
    long result = real(number, arguments[0], arguments[1], arguments[2], arguments[3],
                       arguments[4], arguments[5]);
    if (number == SETUP && result >= 0)
        ((unsigned *)arguments[1])[5] &= ~(unsigned)number_in("REFUSE_FEATURES");
    if (number == SYS_statx && result >= 0 && getenv("REFUSE_SIZE") != NULL)
        replace_size((char *)arguments[4]);
    return result;
}
