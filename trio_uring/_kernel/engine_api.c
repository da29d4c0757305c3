/* The functions that engine_api.h declares. Compiled as one unit with ring.c, after the functions
 * that it names. */

/* Whether the ring may be used, and the kernel has taken all pushed SQEs. */
static int ring_is_idle(struct ring *ring)
{
    return ring_refuses(ring) == 0 && ring_publish(ring) == 0;
}

static const void *engine_api(void)
{
    static const struct engine_api api = {ENGINE_API_LAYOUT, ring_push_many, ring_submit_and_wait,
                                          buffer_ring_add, ring_is_idle, look_up_cached,
                                          find_cached, open_cached, read_found};
    return &api;
}
