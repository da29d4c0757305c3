/*
 * The yardstick of bench_direct.py: 4 KiB O_DIRECT reads on raw io_uring, nothing in between.
 *
 * One thread keeps `depth` reads in flight, each into a registered buffer of its own, and prints
 * reads per second and CPU microseconds per read. The set-up is the package's own.
 *
 *     cc -O2 -o direct_read direct_read.c
 *     ./direct_read FILE BYTES DEPTH READS SEED
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SIZE 4096

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
           (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return fprintf(stderr, "direct_read FILE BYTES DEPTH READS SEED\n"), 2;
    uint64_t blocks = strtoull(argv[2], NULL, 10) / SIZE;
    unsigned depth = atoi(argv[3]), reads = atoi(argv[4]), seed = atoi(argv[5]);
    int file = open(argv[1], O_RDONLY | O_DIRECT);
    if (file < 0)
        fail("open");

    struct io_uring_params params = {
        .cq_entries = 4096,
        .flags = IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE | IORING_SETUP_SUBMIT_ALL |
                 (1U << 12) /* SINGLE_ISSUER */ | (1U << 13) /* DEFER_TASKRUN */};
    int ring = syscall(__NR_io_uring_setup, 256, &params);
    if (ring < 0)
        fail("io_uring_setup");
    size_t rings_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    char *rings = mmap(NULL, rings_size > sq_size ? rings_size : sq_size, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *sqes = mmap(NULL, params.sq_entries * sizeof *sqes,
                                     PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                                     IORING_OFF_SQES);
    char *memory = mmap(NULL, (size_t)depth * SIZE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (rings == MAP_FAILED || sqes == MAP_FAILED || memory == MAP_FAILED)
        fail("mmap");
    struct iovec vector = {memory, (size_t)depth * SIZE};
    if (syscall(__NR_io_uring_register, ring, IORING_REGISTER_BUFFERS, &vector, 1) < 0)
        fail("IORING_REGISTER_BUFFERS");

    unsigned *sq_tail = (unsigned *)(rings + params.sq_off.tail);
    unsigned *sq_array = (unsigned *)(rings + params.sq_off.array);
    unsigned *cq_head = (unsigned *)(rings + params.cq_off.head);
    unsigned *cq_tail = (unsigned *)(rings + params.cq_off.tail);
    struct io_uring_cqe *cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    unsigned sq_mask = params.sq_entries - 1, cq_mask = params.cq_entries - 1;

    unsigned *free_slots = calloc(depth, sizeof *free_slots), n_free = depth;
    for (unsigned i = 0; i < depth; i++)
        free_slots[i] = i;

    double begin = now(), cpu = cpu_seconds();
    unsigned submitted = 0, completed = 0, tail = *sq_tail;
    while (completed < reads) {
        unsigned fresh = 0;
        while (n_free > 0 && submitted < reads) {
            unsigned slot = free_slots[--n_free];
            seed = seed * 1664525 + 1013904223;
            struct io_uring_sqe *sqe = &sqes[tail & sq_mask];
            memset(sqe, 0, sizeof *sqe);
            sqe->opcode = IORING_OP_READ_FIXED;
            sqe->fd = file;
            sqe->off = (uint64_t)(seed >> 8) % blocks * SIZE;
            sqe->addr = (uint64_t)(uintptr_t)(memory + (size_t)slot * SIZE);
            sqe->len = SIZE;
            sqe->user_data = slot;
            sq_array[tail & sq_mask] = tail & sq_mask;
            tail++, submitted++, fresh++;
        }
        __atomic_store_n(sq_tail, tail, __ATOMIC_RELEASE);
        if (syscall(__NR_io_uring_enter, ring, fresh, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
            fail("io_uring_enter");
        unsigned head = *cq_head;
        while (head != __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE)) {
            struct io_uring_cqe *cqe = &cqes[head++ & cq_mask];
            if (cqe->res != SIZE)
                return fprintf(stderr, "a read gave %d\n", cqe->res), 1;
            free_slots[n_free++] = cqe->user_data;
            completed++;
        }
        __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
    }
    printf("%f %f\n", reads / (now() - begin), (cpu_seconds() - cpu) / reads * 1e6);
    return 0;
}
