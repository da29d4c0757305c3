/*
 * The buffer ring: we provide buffers, the kernel fills them, and completions bring them back.
 *
 * Memory is as in queues.pml. Item n is one use of a buffer, from its entry in the ring to our copy
 * of its data; its buffer and its place in the ring are those of item n - BUFFERS. What brings them
 * back is the completion, that is the CQ's tail. Besides the entries, the buffers' memory is not
 * atomic either: the kernel may fill a buffer again only if we have copied the data before.
 *
 * The kernel fills buffers in the order in which it gets them. With -DMUTANT... one order is missing.
 */

#define BUFFERS 2
#define ITEMS 5

byte given; /* entries that we have written */
byte tail;
byte copied;   /* items whose data we have copied */
byte taken;    /* entries that the kernel has read */
byte filled;   /* buffers that it has filled */
byte cq_tail;  /* completions that it has posted */

bool tail_was[ITEMS + 1];
byte tail_carries_given[ITEMS + 1];
byte tail_carries_copied[ITEMS + 1];
bool cq_tail_was[ITEMS + 1];
byte cq_tail_carries[ITEMS + 1]; /* both taken and filled */

#define LOAD(was, last, seen) do :: seen < last -> seen++ :: seen == 0 || was[seen] -> break od

inline know(number, more) {
    if
    :: more > number -> number = more
    :: else
    fi
}

active proctype us()
{
    byte seen_cq_tail;
    byte known_filled; /* and known to be taken */
    do
#ifdef MUTANT_GIVEN_BACK_BEFORE_COPY
    :: given < ITEMS && (given < BUFFERS || seen_cq_tail > given - BUFFERS) ->
#else
    :: given < ITEMS && (given < BUFFERS || copied > given - BUFFERS) ->
#endif
       d_step {
#ifdef MUTANT_TAIL_BEFORE_ENTRY
           tail = given + 1; tail_was[tail] = true;
           tail_carries_given[tail] = given; tail_carries_copied[tail] = copied;
#endif
           assert(given < BUFFERS || known_filled > given - BUFFERS);
           given++
       }
    :: tail < given ->
       d_step {
           tail = given; tail_was[tail] = true;
#ifndef MUTANT_TAIL_STORED_WITHOUT_RELEASE
           /* buffer_ring.c: entry->bid = (uint16_t)id; pool->tail++; __atomic_store_n(&pool->entries->tail, pool->tail, __ATOMIC_RELEASE); */
           tail_carries_given[tail] = given;
           tail_carries_copied[tail] = copied
#endif
       }
    :: seen_cq_tail < cq_tail ->
       atomic {
           LOAD(cq_tail_was, cq_tail, seen_cq_tail);
#ifndef MUTANT_CQ_TAIL_LOADED_WITHOUT_ACQUIRE
           /* ring.c: unsigned count = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) - head; */
           know(known_filled, cq_tail_carries[seen_cq_tail])
#endif
       }
    :: copied < seen_cq_tail -> d_step { assert(known_filled > copied); copied++ }
    :: copied == ITEMS -> break
    od
}

active proctype kernel()
{
    byte seen_tail;
    byte known_given;
    byte known_copied;
    do
    :: seen_tail < tail ->
       atomic {
           LOAD(tail_was, tail, seen_tail);
#ifndef MUTANT_KERNEL_LOADS_TAIL_WITHOUT_ACQUIRE
           /* io_ring_buffer_select(): smp_load_acquire(&br->tail) */
           know(known_given, tail_carries_given[seen_tail]);
           know(known_copied, tail_carries_copied[seen_tail])
#endif
       }
    :: taken < seen_tail -> d_step { assert(known_given > taken); taken++ }
    :: filled < taken ->
       d_step { assert(filled < BUFFERS || known_copied > filled - BUFFERS); filled++ }
    :: cq_tail < filled ->
       d_step {
           cq_tail = filled; cq_tail_was[cq_tail] = true;
#ifndef MUTANT_KERNEL_STORES_CQ_TAIL_WITHOUT_RELEASE
           /* io_commit_cqring(): smp_store_release(&ctx->rings->cq.tail, ctx->cached_cq_tail) */
           cq_tail_carries[cq_tail] = filled
#endif
       }
    :: cq_tail == ITEMS -> break
    od
}
