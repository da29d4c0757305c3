/*
 * Provided buffers: a ring of buffers from which the kernel takes one when it has data.
 *
 * Compiled into one unit with ring.c, after it. The tail is written by us and read by the
 * kernel: a store-release, after the entry is filled.
 *
 * The memory of the buffers is Python's, and may outlive all this; the entries are ours.
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
        return; /* the entries are the parent's; a task may still take what came before */
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

/* buffers has room for count buffers, and stays where it is until the ring is drained. From an
 * incremental one a receive takes only what it fills: the next goes on behind it, until a
 * completion without F_BUF_MORE says that the buffer is used up (Linux 6.12). */
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
        /* The kernel pins the entries; a child's copy-on-write must not split them off. */
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

/* Unregister and free. The caller knows that no operation selects from the group any more, and
 * that the ring is open. The entries of a forked child are its parent's. */
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
