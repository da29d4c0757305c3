/*
 * The functions of the C core that the native engine (engine/) calls. The core is compiled only
 * into the cffi module, so that there is one list of rings for fork and one numbering of threads.
 */
#ifndef ENGINE_API_H
#define ENGINE_API_H

#include <stddef.h>
#include <stdint.h>

#include "uapi.h"

#define ENGINE_API_LAYOUT 3 /* must be changed with the types in this file */

struct ring;
struct buffer_ring;

/* An operation as Python describes it: the fields of an SQE except user_data. */
struct sqe_fields {
    uint8_t opcode, sqe_flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off;
    void *addr;
    uint32_t len, op_flags;
    uint16_t buf_index;
    int32_t splice_fd_in;
    uint64_t addr3;
};
_Static_assert(sizeof(struct sqe_fields) == 48, "read_many in _operations/_arrays.py relies on it");

/* A file, as its path is looked up in the kernel's cache. */
struct found { uint64_t mount, size; uint16_t mode; };

struct engine_api {
    uint32_t layout;
    int (*push_many)(struct ring *, const struct sqe_fields *, unsigned start, unsigned end,
                     uint64_t user_data);
    int (*submit_and_wait)(struct ring *, double timeout, struct io_uring_cqe *, unsigned room);
    void (*buffer_ring_add)(struct buffer_ring *, unsigned id);
    int (*is_idle)(struct ring *);
    /* Of cached.c. They return a negative errno. */
    int (*look_up_cached)(const char *path, int flags, struct found *);
    int (*find_cached)(const char *path, int flags);
    int (*open_cached)(const char *path, int flags);
    long (*read_found)(const char *path, char *memory, size_t size);
};

#endif
