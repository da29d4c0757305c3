/*
 * Provided buffers: a ring of buffers, from which the kernel picks one when it has data.
 *
 * Compiled as one unit with ring.c, after it. We write the tail and the kernel reads it, so it is
 * stored with release ordering after the entry is filled (tests/model/buffers.pml).
 *
 * Python owns the memory of the buffers, which may be freed later than the buffer ring. The entries
 * are allocated here.
 */
struct buffer_ring {
    struct ring *ring;
    struct io_uring_buf_ring *entries;
    size_t entries_size;
    unsigned places, buffer_size, group; /* places is a power of two */
    uint16_t tail;
    char *buffers;
};

static void buffer_ring_add(struct buffer_ring *pool, unsigned id)
{
    if (pool->ring->forked)
        return; /* the parent owns the entries; a task may still take data received before */
    struct io_uring_buf *entry = &pool->entries->bufs[pool->tail & (pool->places - 1)];
    entry->addr = (uint64_t)(uintptr_t)(pool->buffers + (size_t)id * pool->buffer_size);
    entry->len = pool->buffer_size;
    entry->bid = (uint16_t)id;
    pool->tail++;
    __atomic_store_n(&pool->entries->tail, pool->tail, __ATOMIC_RELEASE);
}

static void buffer_ring_free(struct buffer_ring *pool)
{
    if (pool->entries != MAP_FAILED)
        munmap(pool->entries, pool->entries_size);
    free(pool);
}

/* buffers has room for count buffers, and must not be freed or moved until the ring is drained. If
 * incremental, a receive takes only the part of a buffer that it fills, and the next receive takes
 * the part behind it. A completion without F_BUF_MORE says that the buffer is used up (Linux 6.12).
 */
static int buffer_ring_open(struct buffer_ring **out, struct ring *ring, unsigned group,
                            unsigned count, unsigned buffer_size, void *buffers, int incremental)
{
    int refused = ring_refuses(ring);
    if (refused)
        return refused;
    struct buffer_ring *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return -ENOMEM;
    pool->ring = ring;
    pool->places = 1;
    while (pool->places < count)
        pool->places *= 2;
    pool->buffer_size = buffer_size;
    pool->group = group;
    pool->buffers = buffers;
    pool->entries_size = pool->places * sizeof(struct io_uring_buf);
    pool->entries = mmap(NULL, pool->entries_size, PROT_READ | PROT_WRITE,
                         MAP_ANONYMOUS | MAP_PRIVATE, -1, 0);
    int result = -ENOMEM;
    if ((void *)pool->entries != MAP_FAILED) {
        struct io_uring_buf_reg registration = {
            .ring_addr = (uint64_t)(uintptr_t)pool->entries,
            .ring_entries = pool->places, .bgid = (uint16_t)group,
            .flags = incremental ? IOU_PBUF_RING_INC : 0};
        /* The kernel pins the pages of the entries. After a fork, copy-on-write would give us other
         * pages. */
        madvise(pool->entries, pool->entries_size, MADV_DONTFORK);
        result = ring_register(ring, IORING_REGISTER_PBUF_RING, &registration, 1);
    }
    if (result < 0) {
        buffer_ring_free(pool);
        return result;
    }
    *out = pool;
    return 0;
}

/* Unregister and free. No operation may select from the group any more, and the ring must be open.
 * A forked child does not unmap the entries, which are its parent's. */
static int buffer_ring_close(struct buffer_ring *pool)
{
    struct io_uring_buf_reg registration = {.bgid = (uint16_t)pool->group};
    int result = 0;
    if (pool->ring->forked)
        pool->entries = MAP_FAILED;
    else
        result = ring_register(pool->ring, IORING_UNREGISTER_PBUF_RING, &registration, 1);
    if (result == 0)
        buffer_ring_free(pool);
    return result;
}
