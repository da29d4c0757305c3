/*
 * Preloaded into a child, this stands before libc's syscall() and lets io_uring's calls fail as
 * older kernels, limits and filters do. What fails stands in the environment:
 *
 *   REFUSE_FLAGS=mask       io_uring_setup with one of these flags: EINVAL
 *   REFUSE_ABOVE=entries    io_uring_setup with more entries: ENOMEM
 *   REFUSE_SETUP=errno      io_uring_setup, always
 *   REFUSE_FEATURES=mask    io_uring_setup succeeds, without these features
 *   REFUSE_ENTER=errno      io_uring_enter, always
 *   REFUSE_ENTERS=n:errno   io_uring_enter, each n-th call
 *   REFUSE_REGISTER=op:errno,op:errno,...
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

enum { SETUP = 425, ENTER = 426, REGISTER = 427 };

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
    if (error != 0) {
        errno = error;
        return -1;
    }
    if (real == NULL)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    long result = real(number, arguments[0], arguments[1], arguments[2], arguments[3],
                       arguments[4], arguments[5]);
    if (number == SETUP && result >= 0)
        ((unsigned *)arguments[1])[5] &= ~(unsigned)number_in("REFUSE_FEATURES");
    return result;
}
