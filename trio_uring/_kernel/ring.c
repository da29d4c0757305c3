/*
 * The ring. The code here is in C because Python cannot express it (memory ordering, shared memory)
 * or because it runs once per operation (filling an SQE) or once per loop iteration (enter, drain).
 * All policy is in Python. It uses raw system calls and our own header (uapi.h), not liburing.
 *
 * Errors are returned as -errno, as by the kernel. Nothing here prints or raises, and every retry
 * is bounded.
 *
 * Memory ordering, as io_uring(7) asks, and as tests/model/queues.pml shows to be needed:
 *
 *   SQ tail   we write, the kernel reads     store-release, after the SQE is filled
 *   SQ head   the kernel writes, we read     load-acquire, before we reuse an SQE
 *   CQ tail   the kernel writes, we read     load-acquire, before we read a CQE
 *   CQ head   we write, the kernel reads     store-release, after we have copied the CQEs
 *   SQ flags  the kernel writes, we read     relaxed, but see ring_sq_needs_wakeup
 */
#ifndef _GNU_SOURCE /* Python.h may have defined it already */
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "engine_api.h"

struct ring {
    int fd;
    int enter_fd;           /* the registered index of fd, or fd itself */
    unsigned enter_flags;   /* IORING_ENTER_REGISTERED_RING, or 0 */
    unsigned setup_flags;
    unsigned features;
    int closed;             /* unmapped; only this structure is left */
    int used;               /* an operation other than NOP was pushed */
    int forked;             /* set in a forked child: its parent owns the ring */
    int dup_fd;             /* see ring_dup; -1 if there is none */
    uint64_t thread;        /* the thread that set it up, see this_thread() */

    unsigned *sq_head, *sq_tail, *sq_flags;
    unsigned sq_mask, sq_entries;
    unsigned sq_pushed;     /* our copy of *sq_tail; ahead of it until ring_publish */
    struct io_uring_sqe *sqes;

    unsigned *cq_head, *cq_tail;
    unsigned cq_mask, cq_entries;
    struct io_uring_cqe *cqes;

    void *rings_map, *sqes_map;
    size_t rings_size, sqes_size;

    unsigned long long enters, pushed;
    struct batch **batches; /* see batch.c */
    unsigned batch_slots, batches_open;
    struct ring *next, **link;  /* the list of all open rings of this process, for fork */
};

static int batch_collect(struct ring *ring, struct io_uring_cqe *cqes, unsigned count);
static void batch_free_all(struct ring *ring);

/* ---- Fork ------------------------------------------------------------------------------
 *
 * If a child pushed an SQE into memory shared with its parent, the parent would submit it. So the
 * mappings are not inherited (MADV_DONTFORK), and `forked`, in ordinary memory, is set in a child.
 * The child's fd is closed. Otherwise, if the parent died, its operations would stay in flight and
 * its sockets open. pthread_atfork also handles forks that Python does not know of.
 */
static pthread_mutex_t all_rings_lock = PTHREAD_MUTEX_INITIALIZER;
static struct ring *all_rings;
static pthread_once_t atfork_once = PTHREAD_ONCE_INIT;

static void before_fork(void) { pthread_mutex_lock(&all_rings_lock); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&all_rings_lock); }
static void after_fork_in_child(void)
{
    for (struct ring *ring = all_rings; ring != NULL; ring = ring->next) {
        ring->forked = 1;
        close(ring->fd);
        ring->fd = -1;
        if (ring->dup_fd >= 0)
            close(ring->dup_fd);
        ring->dup_fd = -1;
    }
    pthread_mutex_unlock(&all_rings_lock);
}
static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void remember_ring(struct ring *ring)
{
    pthread_once(&atfork_once, watch_forks);
    pthread_mutex_lock(&all_rings_lock);
    ring->next = all_rings;
    ring->link = &all_rings;
    if (all_rings != NULL)
        all_rings->link = &ring->next;
    all_rings = ring;
    pthread_mutex_unlock(&all_rings_lock);
}

static void forget_ring(struct ring *ring)
{
    pthread_mutex_lock(&all_rings_lock);
    *ring->link = ring->next;
    if (ring->next != NULL)
        ring->next->link = ring->link;
    pthread_mutex_unlock(&all_rings_lock);
}

/* ---- Who may use a ring ------------------------------------------------------------------
 *
 * Only the thread that set it up may use a ring. With SINGLE_ISSUER the kernel refuses other
 * threads. Without it they would race with each other. And a registered ring fd is another ring in
 * another thread. Pthreads reuses the ID of a thread that has ended, so threads get numbers here.
 */
static uint64_t this_thread(void)
{
    static uint64_t threads;
    static _Thread_local uint64_t number;
    if (number == 0)
        number = __atomic_add_fetch(&threads, 1, __ATOMIC_RELAXED);
    return number;
}

static int ring_is_mine(struct ring *ring) { return ring->thread == this_thread(); }

/* Returns 0, or why calls are refused: the ring is closed, the parent's, or another thread's. */
static int ring_refuses(struct ring *ring)
{
    if (ring->closed)
        return -ESHUTDOWN;
    if (ring->forked)
        return -EOWNERDEAD;
    return ring_is_mine(ring) ? 0 : -EXDEV;
}

/* ---- Syscalls -------------------------------------------------------------------------- */

static int sys_setup(unsigned entries, struct io_uring_params *params)
{
    int fd = (int)syscall(__NR_io_uring_setup, entries, params);
    return fd < 0 ? -errno : fd;
}

static int sys_enter(struct ring *ring, unsigned to_submit, unsigned min_complete,
                     unsigned flags, const void *argument, size_t size)
{
    ring->enters++;
    int result = (int)syscall(__NR_io_uring_enter, ring->enter_fd, to_submit, min_complete,
                              flags | ring->enter_flags, argument, size);
    return result < 0 ? -errno : result;
}

static int sys_register(int fd, unsigned opcode, void *argument, unsigned count)
{
    int result = (int)syscall(__NR_io_uring_register, fd, opcode, argument, count);
    return result < 0 ? -errno : result;
}

/* ---- Set up and close ------------------------------------------------------------------ */

static int map_rings(struct ring *ring, struct io_uring_params *params)
{
    size_t sq_size = params->sq_off.array + params->sq_entries * sizeof(unsigned);
    size_t cq_size = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_size = sq_size > cq_size ? sq_size : cq_size;
    ring->sqes_size = params->sq_entries * sizeof(struct io_uring_sqe);

    ring->rings_map = mmap(NULL, ring->rings_size, PROT_READ | PROT_WRITE,
                           MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
    if (ring->rings_map == MAP_FAILED)
        return -errno;
    ring->sqes_map = mmap(NULL, ring->sqes_size, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
    if (ring->sqes_map == MAP_FAILED)
        return -errno;
    if (madvise(ring->rings_map, ring->rings_size, MADV_DONTFORK) < 0 ||
        madvise(ring->sqes_map, ring->sqes_size, MADV_DONTFORK) < 0)
        return -errno;

    char *base = ring->rings_map;
    ring->sq_head = (unsigned *)(base + params->sq_off.head);
    ring->sq_tail = (unsigned *)(base + params->sq_off.tail);
    ring->sq_flags = (unsigned *)(base + params->sq_off.flags);
    ring->sq_mask = *(unsigned *)(base + params->sq_off.ring_mask);
    ring->sq_entries = params->sq_entries;
    ring->sqes = ring->sqes_map;
    ring->cq_head = (unsigned *)(base + params->cq_off.head);
    ring->cq_tail = (unsigned *)(base + params->cq_off.tail);
    ring->cq_mask = *(unsigned *)(base + params->cq_off.ring_mask);
    ring->cq_entries = params->cq_entries;
    ring->cqes = (struct io_uring_cqe *)(base + params->cq_off.cqes);

    /* SQE i is always at index i: the indirection of the SQ array is not used. */
    unsigned *array = (unsigned *)(base + params->sq_off.array);
    for (unsigned i = 0; i < params->sq_entries; i++)
        array[i] = i;
    return 0;
}

static void unmap_and_close(struct ring *ring)
{
    /* In a forked child the rings are not mapped, and the addresses may be in use by others. */
    if (!ring->forked) {
        if (ring->rings_map != MAP_FAILED)
            munmap(ring->rings_map, ring->rings_size);
        if (ring->sqes_map != MAP_FAILED)
            munmap(ring->sqes_map, ring->sqes_size);
    }
    if (ring->fd >= 0)
        close(ring->fd);
}

/* Allocate a ring that is not open yet. Python owns it before it has resources that could leak. */
static struct ring *ring_new(void)
{
    struct ring *ring = calloc(1, sizeof *ring);
    if (ring != NULL) {
        ring->fd = ring->dup_fd = -1;
        ring->closed = 1;
        ring->rings_map = ring->sqes_map = MAP_FAILED;
    }
    return ring;
}

/* Set up a ring exactly as requested. Python tries weaker flags (_ring_setup.py). */
static int ring_open(struct ring *ring, unsigned entries, unsigned cq_entries,
                     unsigned setup_flags, unsigned sq_thread_idle_ms, unsigned sq_thread_cpu)
{
    if (ring == NULL)
        return -ENOMEM;
    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    params.flags = setup_flags;
    params.cq_entries = cq_entries;
    params.sq_thread_idle = sq_thread_idle_ms;
    params.sq_thread_cpu = sq_thread_cpu;

    int fd = sys_setup(entries, &params); /* the kernel makes it O_CLOEXEC */
    if (fd < 0)
        return fd;
    ring->fd = fd;
    ring->enter_fd = ring->fd;
    ring->thread = this_thread();
    ring->setup_flags = params.flags;
    ring->features = params.features;
    /* Linux 5.4, 5.5, 5.11: one mapping for both rings, no dropped CQEs, timeouts in enter. */
    unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
    int result = (ring->features & needed) == needed ? map_rings(ring, &params) : -ENOSYS;
    if (result < 0) {
        unmap_and_close(ring);
        ring->fd = -1;
        return result;
    }
    remember_ring(ring);
    ring->closed = 0;
    return 0;
}

/* The number of SQEs that were pushed and that the kernel has not taken yet. */
static unsigned ring_unsubmitted(struct ring *ring)
{
    if (ring->closed || ring->forked)
        return 0;
    return ring->sq_pushed - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
}

/* Whether an unsubmitted SQE may act on fd. An fd is in one of three fields. For some opcodes these
 * fields have other meanings, so the result may be a false positive. */
static int ring_unsubmitted_for(struct ring *ring, int fd)
{
    unsigned count = ring_unsubmitted(ring);
    for (unsigned i = ring->sq_pushed - count; i != ring->sq_pushed; i++) {
        struct io_uring_sqe *sqe = &ring->sqes[i & ring->sq_mask];
        if (sqe->fd == fd || sqe->splice_fd_in == fd || (int)sqe->len == fd)
            return 1;
    }
    return 0;
}

static unsigned long long ring_submitted(struct ring *ring)
{
    return ring->pushed - ring_unsubmitted(ring);
}

/* Register the ring's fd, so that enter need not look it up. Linux 5.18. */
static int ring_register_ring_fd(struct ring *ring)
{
    struct io_uring_rsrc_update update = {.offset = -1U, .data = (uint64_t)ring->fd};
    int result = sys_register(ring->fd, IORING_REGISTER_RING_FDS, &update, 1);
    if (result != 1)
        return result < 0 ? result : -EINVAL;
    ring->enter_fd = (int)update.offset;
    ring->enter_flags = IORING_ENTER_REGISTERED_RING;
    return 0;
}

/* Unmap and close. The caller has drained the ring, because closing does not stop the kernel's
 * writes into buffers. A registered ring fd would keep the ring alive, so it is unregistered first.
 * Only the thread that registered it can do so; in other threads it is not tried. */
static void ring_close(struct ring *ring)
{
    if (ring->closed)
        return;
    if (ring->enter_flags && ring_refuses(ring) == 0) {
        struct io_uring_rsrc_update update = {.offset = (unsigned)ring->enter_fd};
        sys_register(ring->fd, IORING_UNREGISTER_RING_FDS, &update, 1);
    }
    ring->pushed = ring_submitted(ring);
    forget_ring(ring);
    unmap_and_close(ring);
    ring->closed = 1;
    ring->fd = -1;
}

/* The structure outlives the ring, so that late calls are refused. A ring that was not closed is
 * leaked, because the kernel may still use it. If only NOPs were pushed, it is closed here. */
static void ring_free(struct ring *ring)
{
    if (ring != NULL && !ring->used)
        ring_close(ring);
    if (ring != NULL && ring->closed) {
        batch_free_all(ring);
        free(ring);
    }
}

static int ring_register(struct ring *ring, unsigned opcode, void *argument, unsigned count)
{
    int refused = ring_refuses(ring);
    return refused ? refused : sys_register(ring->fd, opcode, argument, count);
}

/* Duplicate the ring's fd; called once. A forked child closes it too, until ring_forget_dup. */
static int ring_dup(struct ring *ring)
{
    int refused = ring_refuses(ring);
    if (refused)
        return refused;
    pthread_mutex_lock(&all_rings_lock);
    ring->dup_fd = fcntl(ring->fd, F_DUPFD_CLOEXEC, 0);
    int result = ring->dup_fd < 0 ? -errno : ring->dup_fd;
    pthread_mutex_unlock(&all_rings_lock);
    return result;
}

static void ring_forget_dup(struct ring *ring)
{
    pthread_mutex_lock(&all_rings_lock);
    ring->dup_fd = -1;
    pthread_mutex_unlock(&all_rings_lock);
}

static int ring_fd(struct ring *ring) { return ring->fd; }
static unsigned ring_setup_flags(struct ring *ring) { return ring->setup_flags; }
static unsigned ring_features(struct ring *ring) { return ring->features; }
static unsigned ring_sq_entries(struct ring *ring) { return ring->sq_entries; }
static unsigned ring_cq_entries(struct ring *ring) { return ring->cq_entries; }
static unsigned long long ring_enters(struct ring *ring) { return ring->enters; }

/* ---- The submission queue -------------------------------------------------------------- */

/* Publish the pushed SQEs to the kernel; return how many it has not taken yet. */
static unsigned ring_publish(struct ring *ring)
{
    __atomic_store_n(ring->sq_tail, ring->sq_pushed, __ATOMIC_RELEASE);
    return ring->sq_pushed - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
}

/* SQPOLL: whether the kernel's thread must be woken. The thread sets NEED_WAKEUP, reads the tail
 * once more, and sleeps. We store the tail and read NEED_WAKEUP. With only release and acquire,
 * each could miss the other's store (store buffering), and the SQE would never be taken. A full
 * fence between our store and our load prevents that. tests/model/sqpoll.pml proves it. */
static int ring_sq_needs_wakeup(struct ring *ring)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return (__atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & IORING_SQ_NEED_WAKEUP) != 0;
}

/* Submit all pushed SQEs without waiting for completions. */
static int ring_submit(struct ring *ring, unsigned flags)
{
    unsigned to_submit = ring_publish(ring);
    if (!(ring->setup_flags & IORING_SETUP_SQPOLL))
        return sys_enter(ring, to_submit, 0, flags, NULL, 0);
    if (to_submit && ring_sq_needs_wakeup(ring)) /* the thread submits */
        flags |= IORING_ENTER_SQ_WAKEUP;
    return flags ? sys_enter(ring, 0, 0, flags, NULL, 0) : 0;
}

/* SQPOLL: wait until the thread has taken every SQE. It advances the head after it has issued the
 * SQEs that it took. So by then it has looked up every fd and performed every cancellation. The
 * wait is bounded by its work: if it sleeps it is woken, and if it has ended, enter fails. */
static int ring_wait_until_taken(struct ring *ring)
{
    struct timespec pause = {.tv_nsec = 50000};
    ring_publish(ring);
    for (unsigned looks = 0; ring_unsubmitted(ring) != 0; looks++) {
        if (ring_sq_needs_wakeup(ring)) {
            int result = sys_enter(ring, 0, 0, IORING_ENTER_SQ_WAKEUP, NULL, 0);
            if (result < 0)
                return result;
        }
        /* Usually it takes a microsecond or two. But the thread may need our CPU. */
        if (looks < 1000)
            sched_yield();
        else
            nanosleep(&pause, NULL);
    }
    return 0;
}

/* Submit, and make operations that were cancelled or are finished release their files now, before
 * the caller closes an fd. The CQEs stay in the CQ. */
static int ring_flush(struct ring *ring)
{
    int result = ring_refuses(ring);
    if (result)
        return result;
    if (ring->setup_flags & IORING_SETUP_SQPOLL)
        return ring_wait_until_taken(ring);
    do /* without SUBMIT_ALL, the kernel stops submitting at an invalid SQE */
        result = ring_submit(ring, IORING_ENTER_GETEVENTS);
    while (result > 0 && ring_unsubmitted(ring) != 0);
    return result;
}

/* ---- The completion queue -------------------------------------------------------------- */

static unsigned ring_ready(struct ring *ring)
{
    return __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) - *ring->cq_head;
}

/* Copy at most room CQEs out of the CQ, and make their entries free for the kernel. */
static unsigned ring_drain(struct ring *ring, struct io_uring_cqe *out, unsigned room)
{
    unsigned head = *ring->cq_head;
    unsigned count = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) - head;
    if (count > room)
        count = room;
    for (unsigned i = 0; i < count; i++)
        out[i] = ring->cqes[(head + i) & ring->cq_mask];
    __atomic_store_n(ring->cq_head, head + count, __ATOMIC_RELEASE);
    return count;
}

#define WORK_ITEMS_MAX 20 /* what one enter runs, IO_LOCAL_TW_DEFAULT_MAX (Linux 6.13) */

/* Whether the kernel has work to run in this thread. Only with TASKRUN_FLAG does it tell. */
static int ring_has_work(struct ring *ring)
{
    return (__atomic_load_n(ring->sq_flags, __ATOMIC_ACQUIRE) & IORING_SQ_TASKRUN) != 0;
}

/* The same, or whether it has completions for which the CQ had no room. */
static int ring_has_more(struct ring *ring)
{
    unsigned flags = __atomic_load_n(ring->sq_flags, __ATOMIC_ACQUIRE);
    return (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0;
}

/* Whether the kernel says that another enter would fetch more. Without TASKRUN_FLAG it never does,
 * and one enter fetches everything. */
static int ring_more_to_fetch(struct ring *ring)
{
    return !ring->closed && !ring->forked && ring->setup_flags & IORING_SETUP_TASKRUN_FLAG &&
           ring_has_more(ring);
}

/* Whether an enter would certainly fetch nothing. Without TASKRUN_FLAG, only an enter can tell. */
static int ring_nothing_to_fetch(struct ring *ring)
{
    return ring->setup_flags & IORING_SETUP_TASKRUN_FLAG && !ring_has_more(ring) &&
           ring_ready(ring) == 0;
}

/* Submit all pushed SQEs, wait at most timeout seconds for one completion (0: do not wait), and
 * copy out up to room CQEs. Returns their number; 0 only if the time ran out.
 *
 * Returns -EINTR after a signal, or if it is not known whether the time ran out, because the same
 * enter also submitted: its result is then the number of SQEs. That is no timeout.
 *
 * With timeout 0 and nothing to submit, enter is called only if there may be something to fetch:
 * with DEFER_TASKRUN, completions are only posted inside an enter with GETEVENTS. With SQPOLL the
 * kernel's thread submits and posts, so enter is called only to wake it or to wait. */
static int ring_submit_and_wait(struct ring *ring, double timeout, struct io_uring_cqe *out,
                                unsigned room)
{
    int refused = ring_refuses(ring);
    if (refused)
        return refused;
    unsigned flags = IORING_ENTER_GETEVENTS;
    unsigned to_submit = ring_publish(ring);
    int result = 0, by_itself = 0;
    if (ring->setup_flags & IORING_SETUP_SQPOLL) {
        if (to_submit && ring_sq_needs_wakeup(ring))
            flags |= IORING_ENTER_SQ_WAKEUP;
        else
            by_itself = 1;
        to_submit = 0;
    } else if (timeout <= 0 && to_submit == 0 && ring_nothing_to_fetch(ring)) {
        return 0;
    }
    if (timeout > 0 && ring_ready(ring) == 0) {
        struct uring_timespec wait = {.tv_sec = (int64_t)timeout};
        wait.tv_nsec = (int64_t)((timeout - (double)wait.tv_sec) * 1e9);
        struct io_uring_getevents_arg argument = {
            .sigmask_sz = _NSIG / 8, .ts = (uint64_t)(uintptr_t)&wait};
        result = sys_enter(ring, to_submit, 1, flags | IORING_ENTER_EXT_ARG, &argument,
                           sizeof argument);
    } else {
        timeout = 0;
        if (!by_itself)
            result = sys_enter(ring, to_submit, 0, flags, NULL, 0);
    }
    unsigned count = ring_drain(ring, out, room);
    /* The kernel has more: the CQ was full, or one enter did not run all work items. Run them all,
     * also if there is no room for their completions, which stay in the CQ, or the kernel keeps
     * them. Otherwise those who are served now and ask again at once would come before those whose
     * work item waits: of 3,000 connections that always have data, 2,000 were never served. */
    while (ring_has_work(ring) || (count < room && ring_has_more(ring))) {
        if (sys_enter(ring, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
            break;
        unsigned more = ring_drain(ring, out + count, room - count);
        count += more;
        if (count < room && more < WORK_ITEMS_MAX)
            break; /* it had no more than this */
    }
    if (count > 0)
        return ring->batches_open ? batch_collect(ring, out, count) : (int)count;
    if (result == -ETIME)
        return 0;
    /* The kernel has no memory for requests or completions now. The SQEs stay in the SQ. */
    if (result == -EAGAIN || result == -EBUSY)
        return -EINTR;
    if (result < 0)
        return result;
    return timeout > 0 ? -EINTR : 0;
}
