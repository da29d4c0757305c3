/*
 * Preloaded into a child, this stands before libc's syscall() and hands the calls of io_uring to
 * the simulated kernel (simulated_kernel.py). The C core makes no other calls that reach a ring: its
 * queues are memory that the simulated kernel maps, too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stddef.h>

enum { SETUP = 425, REGISTER = 427 };

/* Returns the result, as a system call of the kernel does; LONG_MIN for a ring that is real. */
typedef long (*simulation)(long number, const long *arguments);
static simulation simulated;

void simulate_io_uring(simulation kernel) { simulated = kernel; }

long syscall(long number, ...)
{
    static long (*real)(long, ...);
    long arguments[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        arguments[i] = va_arg(list, long);
    va_end(list);

    if (simulated != NULL && number >= SETUP && number <= REGISTER) {
        long result = simulated(number, arguments);
        if (result != LONG_MIN) {
            if (result >= 0)
                return result;
            errno = (int)-result;
            return -1;
        }
    }
    if (real == NULL)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return real(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
                arguments[5]);
}
