/*
 * Fills SQEs, one or many in one call, and reports the CQEs of a batch to Python as one.
 *
 * Compiled as one unit with ring.c, which calls batch_collect after fetching CQEs.
 */
/* Make room for count SQEs. If the SQ is full, submit; with SQPOLL, wait until the thread has taken
 * some. Returns -EAGAIN if there is still no room: the caller reaps CQEs and tries again. */
static int ring_make_room(struct ring *ring, unsigned count)
{
    if (ring->sq_entries - ring_unsubmitted(ring) >= count)
        return 0;
    int sqpoll = (ring->setup_flags & IORING_SETUP_SQPOLL) != 0;
    int result = ring_submit(ring, sqpoll ? IORING_ENTER_SQ_WAIT : 0);
    if (ring->sq_entries - ring_unsubmitted(ring) >= count)
        return 0;
    return result < 0 && result != -EBUSY && result != -EINTR ? result : -EAGAIN;
}

/* Fill one SQE, for which there is room. */
static inline void ring_fill(struct ring *ring, uint64_t user_data, uint8_t opcode,
                             uint8_t sqe_flags, uint16_t ioprio, int fd, uint64_t off, void *addr,
                             unsigned len, unsigned op_flags, uint16_t buf_index, int splice_fd_in,
                             uint64_t addr3)
{
    struct io_uring_sqe *sqe = &ring->sqes[ring->sq_pushed & ring->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = (uint8_t)opcode;
    sqe->flags = (uint8_t)sqe_flags;
    sqe->ioprio = (uint16_t)ioprio;
    sqe->fd = fd;
    sqe->off = off;
    sqe->addr = (uint64_t)(uintptr_t)addr;
    sqe->len = len;
    sqe->op_flags = op_flags;
    sqe->buf_index = (uint16_t)buf_index;
    sqe->splice_fd_in = splice_fd_in;
    sqe->addr3 = addr3;
    sqe->user_data = user_data;
    ring->used |= (int)opcode; /* NOP is 0 */
    ring->sq_pushed++;
    ring->pushed++;
}

static int ring_push(struct ring *ring, uint64_t user_data, uint8_t opcode, uint8_t sqe_flags,
                     uint16_t ioprio, int fd, uint64_t off, void *addr, unsigned len,
                     unsigned op_flags, uint16_t buf_index, int splice_fd_in, uint64_t addr3)
{
    int result = ring_refuses(ring);
    if (result == 0)
        result = ring_make_room(ring, 1);
    if (result == 0)
        ring_fill(ring, user_data, opcode, sqe_flags, ioprio, fd, off, addr, len, op_flags,
                  buf_index, splice_fd_in, addr3);
    return result;
}

/* ---- Batches ---------------------------------------------------------------------------
 *
 * The user_data of an operation in a batch consists of BATCH_BIT, the batch's slot in ring->batches
 * (31 bits), and the operation's index in the batch (32 bits). A slot is reused only after the last
 * CQE of every operation of its batch, so a late CQE cannot be mistaken for that of another batch.
 */
#define BATCH_BIT (1ULL << 63)
#define BATCH_DONE 2 /* the user_data of a batch's completion for Python; as in _in_flight.py */

struct batch_result { int32_t res; uint32_t flags; };

struct batch {
    unsigned count;
    unsigned left; /* the number of operations without their last CQE */
    struct batch_result results[];
};

static uint64_t batch_user_data(unsigned slot) { return BATCH_BIT | (uint64_t)slot << 32; }

/* Returns the slot. */
static int batch_open(struct ring *ring, unsigned count)
{
    unsigned slot = 0;
    while (slot < ring->batch_slots && ring->batches[slot] != NULL)
        slot++;
    if (slot == ring->batch_slots) {
        unsigned slots = ring->batch_slots ? 2 * ring->batch_slots : 8;
        struct batch **batches = realloc(ring->batches, slots * sizeof *batches);
        if (batches == NULL)
            return -ENOMEM;
        memset(batches + ring->batch_slots, 0, (slots - ring->batch_slots) * sizeof *batches);
        ring->batches = batches;
        ring->batch_slots = slots;
    }
    struct batch *batch = calloc(1, sizeof *batch + count * sizeof batch->results[0]);
    if (batch == NULL)
        return -ENOMEM;
    batch->count = batch->left = count;
    ring->batches[slot] = batch;
    ring->batches_open++;
    return (int)slot;
}

static void *batch_results(struct ring *ring, unsigned slot)
{
    return ring->batches[slot]->results;
}

static void batch_close(struct ring *ring, unsigned slot)
{
    free(ring->batches[slot]);
    ring->batches[slot] = NULL;
    ring->batches_open--;
}

/* The kernel never writes to results, so they can be freed while operations are in flight. */
static void batch_free_all(struct ring *ring)
{
    for (unsigned slot = 0; slot < ring->batch_slots; slot++)
        free(ring->batches[slot]);
    free(ring->batches);
}

/* The result to which a CQE belongs; NULL if there is none. Any process that has the fd of the ring
 * can send it CQEs with any user_data (IORING_OP_MSG_RING). */
static struct batch_result *batch_result_of(struct ring *ring, unsigned slot, uint32_t index)
{
    struct batch *batch = slot < ring->batch_slots ? ring->batches[slot] : NULL;
    return batch != NULL && index < batch->count ? &batch->results[index] : NULL;
}

/* Remove the CQEs of batches from cqes, and add one for each batch that is done. Returns the number
 * of CQEs; -EINTR if none is left, because the time did not run out. */
static int batch_collect(struct ring *ring, struct io_uring_cqe *cqes, unsigned count)
{
    unsigned kept = 0;
    for (unsigned i = 0; i < count; i++) {
        uint64_t user_data = cqes[i].user_data;
        if (!(user_data & BATCH_BIT)) {
            cqes[kept++] = cqes[i];
            continue;
        }
        unsigned slot = (unsigned)(user_data >> 32) & 0x7fffffff;
        struct batch_result *result = batch_result_of(ring, slot, (uint32_t)user_data);
        if (result == NULL)
            continue;
        /* A zero-copy send has two CQEs: the result, and the notification that the kernel no longer
         * uses the buffer. The res of the notification replaces the flags, as in _in_flight.py. */
        if (cqes[i].flags & IORING_CQE_F_NOTIF) {
            result->flags = (uint32_t)cqes[i].res;
        } else {
            result->res = cqes[i].res;
            result->flags = cqes[i].flags;
        }
        if (!(cqes[i].flags & IORING_CQE_F_MORE) && --ring->batches[slot]->left == 0) {
            cqes[kept].user_data = BATCH_DONE;
            cqes[kept].res = (int32_t)slot;
            cqes[kept++].flags = 0;
        }
    }
    return kept > 0 ? (int)kept : -EINTR;
}

/* Submit if EARLY or more SQEs are waiting, so that a device works while Python runs other tasks. The
 * next submission reports any error. With 32 tasks that read, 8 and 4 give 1.4 times the reads per
 * second that a submission in each turn gives, 16 gives 1.25 (benchmarks/bench_files.py leased). */
#define EARLY 8
static void ring_submit_early(struct ring *ring)
{
    if (ring_unsubmitted(ring) >= EARLY)
        ring_submit(ring, 0);
}

/* Fill the SQEs of operations start to end. Returns the index of the first for which there was no
 * room (the caller reaps CQEs and calls again), or end. A linked chain cannot span two enters, so
 * its SQEs are filled only if there is room for all of them. */
static int ring_push_many(struct ring *ring, const struct sqe_fields *fields, unsigned start,
                          unsigned end, uint64_t user_data)
{
    int refused = ring_refuses(ring);
    if (refused)
        return refused;
    while (start < end) {
        unsigned chain = 1;
        while (start + chain < end && fields[start + chain - 1].sqe_flags & IOSQE_IO_LINK)
            chain++;
        if (chain > ring->sq_entries)
            return -EINVAL;
        int result = ring_make_room(ring, chain);
        if (result == -EAGAIN)
            break;
        if (result < 0)
            return result;
        for (; chain > 0; chain--, start++) {
            const struct sqe_fields *f = &fields[start];
            ring_fill(ring, user_data + start, f->opcode, f->sqe_flags, f->ioprio, f->fd, f->off,
                      f->addr, f->len, f->op_flags, f->buf_index, f->splice_fd_in, f->addr3);
        }
    }
    return (int)start;
}
