/* The functions that engine_api.h declares, as one structure. Compiled into one unit with ring.c,
 * after what it names. */
static const void *engine_api(void)
{
    static const struct engine_api api = {ENGINE_API_LAYOUT, ring_push_many, ring_turn,
                                          buffer_ring_add};
    return &api;
}
