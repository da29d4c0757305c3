/*
 * Declares the part of the kernel's io_uring ABI that the C core uses.
 *
 * <linux/io_uring.h> is not used, because wheels are built in images whose kernel headers are older
 * than the features that we use. (What the running kernel supports is found at run time.) This file
 * must not be included together with that header. Names and layouts are the kernel's. The
 * assertions below each structure check its layout: an error in it would lead to a write to the
 * wrong address. Source: include/uapi/linux/io_uring.h.
 *
 * Reserved fields must be zero, otherwise the kernel returns EINVAL. So clear a structure before
 * filling it.
 */
#ifndef TRIO_URING_UAPI_H
#define TRIO_URING_UAPI_H

#ifdef LINUX_IO_URING_H
#error "uapi.h replaces <linux/io_uring.h>; do not include both"
#endif

#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

/*
 * New system calls have had the same numbers on all architectures since before io_uring, which has
 * 425 to 427. Alpha is the exception: its own header has them, and it has no CPython wheels.
 */
#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup 425
#endif
#ifndef __NR_io_uring_enter
#define __NR_io_uring_enter 426
#endif
#ifndef __NR_io_uring_register
#define __NR_io_uring_register 427
#endif

#define URING_ASSERT_SIZE(type, bytes) \
    _Static_assert(sizeof(struct type) == (bytes), "size of struct " #type)
#define URING_ASSERT_OFFSET(type, field, bytes) \
    _Static_assert(offsetof(struct type, field) == (bytes), "offset of " #type "." #field)

/* ---- io_uring_setup(2) ---------------------------------------------------------------- */

#define IORING_SETUP_SQPOLL (1U << 1)
#define IORING_SETUP_CQSIZE (1U << 3)
#define IORING_SETUP_CLAMP (1U << 4)
#define IORING_SETUP_SUBMIT_ALL (1U << 7)
#define IORING_SETUP_TASKRUN_FLAG (1U << 9)

#define IORING_FEAT_SINGLE_MMAP (1U << 0)
#define IORING_FEAT_NODROP (1U << 1)
#define IORING_FEAT_EXT_ARG (1U << 8)

/* The offset for mmap(2) chooses what is mapped. Unsigned, because off_t has 64 bits. */
#define IORING_OFF_SQ_RING 0ULL
#define IORING_OFF_SQES 0x10000000ULL

/* Filled by the kernel: the offset of each shared word in the mapping. */
struct io_sqring_offsets {
    uint32_t head;
    uint32_t tail;
    uint32_t ring_mask;
    uint32_t ring_entries;
    uint32_t flags;
    uint32_t dropped;
    uint32_t array;
    uint32_t resv1;
    uint64_t user_addr; /* only with IORING_SETUP_NO_MMAP */
};
URING_ASSERT_SIZE(io_sqring_offsets, 40);
URING_ASSERT_OFFSET(io_sqring_offsets, array, 24);
URING_ASSERT_OFFSET(io_sqring_offsets, user_addr, 32);

struct io_cqring_offsets {
    uint32_t head;
    uint32_t tail;
    uint32_t ring_mask;
    uint32_t ring_entries;
    uint32_t overflow;
    uint32_t cqes;
    uint32_t flags; /* 0 before Linux 5.8, which has no such word */
    uint32_t resv1;
    uint64_t user_addr; /* only with IORING_SETUP_NO_MMAP */
};
URING_ASSERT_SIZE(io_cqring_offsets, 40);
URING_ASSERT_OFFSET(io_cqring_offsets, cqes, 20);
URING_ASSERT_OFFSET(io_cqring_offsets, user_addr, 32);

struct io_uring_params {
    uint32_t sq_entries;
    uint32_t cq_entries;
    uint32_t flags;
    uint32_t sq_thread_cpu;
    uint32_t sq_thread_idle; /* milliseconds */
    uint32_t features;
    uint32_t wq_fd;
    uint32_t resv[3];
    struct io_sqring_offsets sq_off;
    struct io_cqring_offsets cq_off;
};
URING_ASSERT_SIZE(io_uring_params, 120);
URING_ASSERT_OFFSET(io_uring_params, features, 20);
URING_ASSERT_OFFSET(io_uring_params, sq_off, 40);
URING_ASSERT_OFFSET(io_uring_params, cq_off, 80);

/* ---- The submission queue ------------------------------------------------------------- */

#define IORING_SQ_NEED_WAKEUP (1U << 0)
#define IORING_SQ_CQ_OVERFLOW (1U << 1)
#define IORING_SQ_TASKRUN (1U << 2)

#define IOSQE_IO_LINK (1U << 2)
#define IOSQE_BUFFER_SELECT (1U << 5)

/* In ioprio. */
#define IORING_RECV_MULTISHOT (1U << 1)

/*
 * The kernel has about twenty names for the word at byte 28 (rw_flags, msg_flags, open_flags, ...),
 * depending on the opcode. Our name is op_flags, because the C core fills it for any opcode.
 */
struct io_uring_sqe {
    uint8_t opcode;
    uint8_t flags;
    uint16_t ioprio;
    int32_t fd;
    union {
        uint64_t off;
        uint64_t addr2;
        struct {
            uint32_t cmd_op;
            uint32_t __pad1;
        };
    };
    union {
        uint64_t addr;
        uint64_t splice_off_in;
        struct {
            uint32_t level;
            uint32_t optname;
        };
    };
    uint32_t len;
    uint32_t op_flags;
    uint64_t user_data;
    union {
        uint16_t buf_index;
        uint16_t buf_group;
    };
    uint16_t personality;
    union {
        int32_t splice_fd_in;
        uint32_t file_index;
        uint32_t zcrx_ifq_idx;
        uint32_t optlen;
        struct {
            uint16_t addr_len;
            uint16_t __pad3[1];
        };
    };
    union {
        uint64_t addr3;
        uint64_t attr_ptr;
        uint64_t optval;
    };
    union {
        uint64_t __pad2[1];
        uint64_t attr_type_mask;
    };
};
URING_ASSERT_SIZE(io_uring_sqe, 64);
URING_ASSERT_OFFSET(io_uring_sqe, flags, 1);
URING_ASSERT_OFFSET(io_uring_sqe, ioprio, 2);
URING_ASSERT_OFFSET(io_uring_sqe, fd, 4);
URING_ASSERT_OFFSET(io_uring_sqe, off, 8);
URING_ASSERT_OFFSET(io_uring_sqe, cmd_op, 8);
URING_ASSERT_OFFSET(io_uring_sqe, addr, 16);
URING_ASSERT_OFFSET(io_uring_sqe, level, 16);
URING_ASSERT_OFFSET(io_uring_sqe, len, 24);
URING_ASSERT_OFFSET(io_uring_sqe, op_flags, 28);
URING_ASSERT_OFFSET(io_uring_sqe, user_data, 32);
URING_ASSERT_OFFSET(io_uring_sqe, buf_index, 40);
URING_ASSERT_OFFSET(io_uring_sqe, personality, 42);
URING_ASSERT_OFFSET(io_uring_sqe, splice_fd_in, 44);
URING_ASSERT_OFFSET(io_uring_sqe, addr_len, 44);
URING_ASSERT_OFFSET(io_uring_sqe, addr3, 48);
URING_ASSERT_OFFSET(io_uring_sqe, __pad2, 56);

/* ---- The completion queue ------------------------------------------------------------- */

#define IORING_CQE_F_BUFFER (1U << 0)
#define IORING_CQE_F_MORE (1U << 1)
#define IORING_CQE_F_NOTIF (1U << 3)
#define IORING_CQE_F_BUF_MORE (1U << 4)
#define IORING_CQE_BUFFER_SHIFT 16

/* The kernel's version ends with big_cqe[], which has 16 bytes on a CQE32 ring. We use no CQE32. */
struct io_uring_cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
};
URING_ASSERT_SIZE(io_uring_cqe, 16);
URING_ASSERT_OFFSET(io_uring_cqe, res, 8);
URING_ASSERT_OFFSET(io_uring_cqe, flags, 12);

/* ---- io_uring_enter(2) ---------------------------------------------------------------- */

#define IORING_ENTER_GETEVENTS (1U << 0)
#define IORING_ENTER_SQ_WAKEUP (1U << 1)
#define IORING_ENTER_SQ_WAIT (1U << 2)
#define IORING_ENTER_EXT_ARG (1U << 3)
#define IORING_ENTER_REGISTERED_RING (1U << 4)

/*
 * struct __kernel_timespec under another name. <linux/time_types.h>, which some libc headers
 * include, defines it too, and C11 allows no second definition. libc's struct timespec cannot be
 * used, because its fields have 32 bits on some 32-bit systems.
 */
struct uring_timespec {
    int64_t tv_sec;
    int64_t tv_nsec;
};
URING_ASSERT_SIZE(uring_timespec, 16);
URING_ASSERT_OFFSET(uring_timespec, tv_nsec, 8);

struct io_uring_getevents_arg {
    uint64_t sigmask;
    uint32_t sigmask_sz;
    uint32_t min_wait_usec; /* must be 0 without IORING_FEAT_MIN_TIMEOUT */
    uint64_t ts;            /* address of a struct uring_timespec */
};
URING_ASSERT_SIZE(io_uring_getevents_arg, 24);
URING_ASSERT_OFFSET(io_uring_getevents_arg, sigmask_sz, 8);
URING_ASSERT_OFFSET(io_uring_getevents_arg, ts, 16);

/* ---- io_uring_register(2) ------------------------------------------------------------- */

#define IORING_REGISTER_BUFFERS 0
#define IORING_REGISTER_PROBE 8
#define IORING_REGISTER_RESTRICTIONS 11
#define IORING_REGISTER_BUFFERS2 15
#define IORING_REGISTER_RING_FDS 20
#define IORING_UNREGISTER_RING_FDS 21
#define IORING_REGISTER_PBUF_RING 22
#define IORING_UNREGISTER_PBUF_RING 23

/* For IORING_REGISTER_RING_FDS: offset is the slot, data the ring's fd. */
struct io_uring_rsrc_update {
    uint32_t offset;
    uint32_t resv;
    uint64_t data;
};
URING_ASSERT_SIZE(io_uring_rsrc_update, 16);
URING_ASSERT_OFFSET(io_uring_rsrc_update, data, 8);

struct io_uring_probe_op {
    uint8_t op;
    uint8_t resv;
    uint16_t flags;
    uint32_t resv2;
};
URING_ASSERT_SIZE(io_uring_probe_op, 8);
URING_ASSERT_OFFSET(io_uring_probe_op, flags, 2);

struct io_uring_probe {
    uint8_t last_op;
    uint8_t ops_len;
    uint16_t resv;
    uint32_t resv2[3];
    struct io_uring_probe_op ops[];
};
URING_ASSERT_SIZE(io_uring_probe, 16);
URING_ASSERT_OFFSET(io_uring_probe, ops, 16);

/* ---- Provided buffers ----------------------------------------------------------------- */

struct io_uring_buf {
    uint64_t addr;
    uint32_t len;
    uint16_t bid;
    uint16_t resv;
};
URING_ASSERT_SIZE(io_uring_buf, 16);
URING_ASSERT_OFFSET(io_uring_buf, len, 8);
URING_ASSERT_OFFSET(io_uring_buf, bid, 12);
URING_ASSERT_OFFSET(io_uring_buf, resv, 14);

/*
 * The ring's tail is in the reserved field of its first entry. So entry 0 must be filled field by
 * field: assigning the whole structure would reset the tail. In C11 with GNU extensions, a flexible
 * array can be in a union only behind such an empty structure. An array of length zero would cause
 * warnings at every access.
 */
struct io_uring_buf_ring {
    union {
        struct {
            uint64_t resv1;
            uint32_t resv2;
            uint16_t resv3;
            uint16_t tail;
        };
        struct {
            struct {
            } __empty;
            struct io_uring_buf bufs[];
        };
    };
};
URING_ASSERT_SIZE(io_uring_buf_ring, 16);
URING_ASSERT_OFFSET(io_uring_buf_ring, tail, 14);
URING_ASSERT_OFFSET(io_uring_buf_ring, bufs, 0);

/* In the flags of io_uring_buf_reg. */
#define IOU_PBUF_RING_INC (1U << 1)

struct io_uring_buf_reg {
    uint64_t ring_addr; /* 0 with IOU_PBUF_RING_MMAP */
    uint32_t ring_entries;
    uint16_t bgid;
    uint16_t flags;
    uint32_t min_left; /* reserved in older kernels, so it must be 0 there */
    uint32_t resv[5];
};
URING_ASSERT_SIZE(io_uring_buf_reg, 40);
URING_ASSERT_OFFSET(io_uring_buf_reg, ring_entries, 8);
URING_ASSERT_OFFSET(io_uring_buf_reg, bgid, 12);
URING_ASSERT_OFFSET(io_uring_buf_reg, flags, 14);

#endif /* TRIO_URING_UAPI_H */
