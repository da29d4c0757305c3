/*
 * The SQ and the CQ: a ring of entries, whose tail one side writes, and whose head the other.
 *
 * In the SQ we are the producer and the kernel is the consumer; in the CQ it is the other way round.
 * So this one model is that of both, and stands for four orders of ring.c.
 *
 * Memory is that of C11, which is weaker than every processor's. A load of an index may return any
 * value from the last one seen on. A store with release order carries what its thread has done, and
 * knows, and a load with acquire order that returns its value gets to know it. Entries are not
 * atomic: two accesses of which neither thread knows that the other is done are a data race, and may
 * come to anything. So an access asserts that its thread knows. As each location has one writer, and
 * items are numbered, what a thread knows is a number.
 *
 * What stands beside a line is the line of ring.c, which check.py looks for there, or the kernel's.
 * With -DMUTANT... one order is missing, and spin must find the data race.
 */

#define ENTRIES 2
#define ITEMS 5 /* twice round, and one more */

byte written;  /* by the producer: items 0 to written - 1 */
byte tail;     /* the last value stored */
byte fetched;  /* by the consumer */
byte head;

bool tail_was[ITEMS + 1]; /* which values were stored ... */
bool head_was[ITEMS + 1];
byte tail_carries[ITEMS + 1]; /* ... and how many items were written, or fetched, before */
byte head_carries[ITEMS + 1];

/* Return one of the values that were stored, not older than the last one seen. */
#define LOAD(was, last, seen) do :: seen < last -> seen++ :: seen == 0 || was[seen] -> break od

inline know(number, more) {
    if
    :: more > number -> number = more
    :: else
    fi
}

active proctype producer()
{
    byte seen_head;
    byte known_fetched; /* items of which we know that the consumer is done with them */
    do
    :: written < ITEMS && written - seen_head < ENTRIES -> /* ring_make_room(): there is room */
       d_step {
#ifdef MUTANT_TAIL_BEFORE_ENTRY
           tail = written + 1; tail_was[tail] = true; tail_carries[tail] = written;
#endif
           /* ring_fill(), or io_fill_cqe() */
           assert(written < ENTRIES || known_fetched > written - ENTRIES);
           written++
       }
    :: tail < written -> /* several at once, or each */
       d_step {
           tail = written; tail_was[tail] = true;
#ifndef MUTANT_TAIL_STORED_WITHOUT_RELEASE
           /* ring.c: __atomic_store_n(ring->sq_tail, ring->sq_pushed, __ATOMIC_RELEASE); return ring->sq_pushed - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE); */
           /* io_commit_cqring(): smp_store_release(&ctx->rings->cq.tail, ctx->cached_cq_tail) */
           tail_carries[tail] = written
#endif
       }
    :: seen_head < head ->
       atomic {
           LOAD(head_was, head, seen_head);
#ifndef MUTANT_HEAD_LOADED_WITHOUT_ACQUIRE
           /* ring.c: if (ring->closed || ring->forked) return 0; return ring->sq_pushed - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE); */
           /* The kernel has a control dependency on its load of cq.head instead. */
           know(known_fetched, head_carries[seen_head])
#endif
       }
    :: tail == ITEMS -> break
    od
}

active proctype consumer()
{
    byte seen_tail;
    byte known_written;
    do
    :: seen_tail < tail ->
       atomic {
           LOAD(tail_was, tail, seen_tail);
#ifndef MUTANT_TAIL_LOADED_WITHOUT_ACQUIRE
           /* ring.c: unsigned count = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) - head; */
           /* io_sqring_entries(): smp_load_acquire(&rings->sq.tail) */
           know(known_written, tail_carries[seen_tail])
#endif
       }
#ifdef MUTANT_HEAD_BEFORE_COPY
    :: head < seen_tail ->
       d_step { head = seen_tail; head_was[head] = true; head_carries[head] = fetched }
#endif
    :: fetched < seen_tail -> d_step { assert(known_written > fetched); fetched++ }
    :: head < fetched ->
       d_step {
           head = fetched; head_was[head] = true;
#ifndef MUTANT_HEAD_STORED_WITHOUT_RELEASE
           /* ring.c: for (unsigned i = 0; i < count; i++) out[i] = ring->cqes[(head + i) & ring->cq_mask]; __atomic_store_n(ring->cq_head, head + count, __ATOMIC_RELEASE); */
           /* io_commit_sqring(): smp_store_release(&rings->sq.head, ctx->cached_sq_head) */
           head_carries[head] = fetched
#endif
       }
    :: head == ITEMS -> break
    od
}
