/* Returns the functions that engine_api.h declares. Compiled as one unit with ring.c, after the
 * functions that it names. */
static const void *engine_api(void)
{
    static const struct engine_api api = {ENGINE_API_LAYOUT, ring_push_many, ring_turn,
                                          buffer_ring_add};
    return &api;
}
