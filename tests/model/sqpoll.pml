/*
 * The two-phase sleep of SQPOLL, as trio_uring/_kernel/ring.c and the kernel speak it.
 *
 * We publish SQEs by storing the SQ's tail, and wake the kernel's thread only if it has said
 * that it sleeps. It says so, looks at the tail once more, and sleeps. If each misses the other's
 * store, an SQE lies there for ever: a missed wakeup, which here is a deadlock.
 *
 * Memory is that of x86-64 (TSO), weak enough to go wrong: each side has a store buffer. A store
 * goes into the buffer, and at some later moment from there to memory, where the other side can
 * see it. A fence waits until the buffer is empty. Nobody loads what it has buffered itself, and one
 * place in each buffer is enough: a second store waits for the first.
 *
 * What stands beside each line is the C line (ours; check.py looks for those that begin with the
 * file's name) or the kernel's (io_uring/sqpoll.c, 6.18).
 *
 * With -DMUTANT... one line is left out or moved. spin must find the missed wakeup in each:
 * tests/model/check.py runs all of them.
 */

#ifndef SQES
#define SQES 3 /* published one by one or several at once; more show nothing new */
#endif

/* ---- Memory --------------------------------------------------------------------------------- */

byte tail;        /* SQ tail: we write */
byte head;        /* SQ head: the kernel writes; unbuffered, for an old one only wakes once more */
bool need_wakeup; /* IORING_SQ_NEED_WAKEUP: the kernel writes */

bool tail_buffered;
byte tail_pending;
bool flag_buffered;
bool flag_pending;

/* The buffers drain when they like, but in the end they do. */
active proctype store_buffers()
{
end:
    do
    :: atomic { tail_buffered -> tail = tail_pending; tail_buffered = false }
    :: atomic { flag_buffered -> need_wakeup = flag_pending; flag_buffered = false }
    od
}

inline store_tail(value) {
    atomic { !tail_buffered -> tail_pending = value; tail_buffered = true }
}
inline store_flag(value) {
    atomic { !flag_buffered -> flag_pending = value; flag_buffered = true }
}
inline our_fence() { !tail_buffered }
inline kernel_fence() { !flag_buffered }

/* ---- The kernel's thread: io_sq_thread() --------------------------------------------------- */

bool on_wait_queue; /* prepare_to_wait() to finish_wait() */
bool woken;         /* wake_up() came since prepare_to_wait(): schedule() returns at once */

active proctype kernel()
{
    byte seen;
awake:
    seen = tail; /* io_sqring_entries(): smp_load_acquire(&rings->sq.tail) */
    if
    :: seen != head -> head = seen /* io_submit_sqes(), io_commit_sqring() */
    :: else
    fi;
    if
    :: goto awake
    :: true /* idle for sq_thread_idle; or for no time: nothing here may depend on it */
    fi;
#ifdef MUTANT_KERNEL_CHECKS_BEFORE_IT_SAYS_SO
    seen = tail;
#endif
#ifndef MUTANT_KERNEL_QUEUES_ITSELF_LATE
    d_step { on_wait_queue = true; woken = false } /* prepare_to_wait() */
#endif
    store_flag(true); /* atomic_or(IORING_SQ_NEED_WAKEUP, &ctx->rings->sq_flags) */
#ifndef MUTANT_KERNEL_HAS_NO_FENCE
    kernel_fence(); /* smp_mb__after_atomic() */
#endif
#if !defined(MUTANT_KERNEL_DOES_NOT_CHECK_AGAIN) && \
    !defined(MUTANT_KERNEL_CHECKS_BEFORE_IT_SAYS_SO)
    seen = tail; /* if (io_sqring_entries(ctx)) needs_sched = false */
#endif
#ifdef MUTANT_KERNEL_QUEUES_ITSELF_LATE
    d_step { on_wait_queue = true; woken = false }
#endif
#ifdef MUTANT_KERNEL_DOES_NOT_CHECK_AGAIN
    seen = head;
#endif
    if
    :: seen != head
    :: else ->
end_asleep:
       woken /* schedule() */
    fi;
    store_flag(false); /* atomic_andnot(IORING_SQ_NEED_WAKEUP, &ctx->rings->sq_flags) */
    on_wait_queue = false; /* finish_wait() */
    goto awake
}

/* ---- We: ring_submit_and_wait(), ring_wait_until_taken() ------------------------------------ */

byte pushed;

inline wake_if_need_be() {
#ifndef MUTANT_WE_HAVE_NO_FENCE
    /* ring.c: __atomic_thread_fence(__ATOMIC_SEQ_CST); return (__atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & IORING_SQ_NEED_WAKEUP) != 0; */
    our_fence();
#endif
    if
    :: need_wakeup -> /* __atomic_load_n(ring->sq_flags) & IORING_SQ_NEED_WAKEUP */
       our_fence(); /* a system call is a fence, too */
       d_step { /* io_uring_enter(IORING_ENTER_SQ_WAKEUP): wake_up(&sqd->wait) */
           if
           :: on_wait_queue -> woken = true
           :: else
           fi
       }
    :: else
    fi
}

active proctype us()
{
    bool asked;
    do
    :: pushed < SQES ->
       pushed++; /* ring_push() */
       if
       :: pushed < SQES /* and another one, before they are published together */
       :: true ->
#ifdef MUTANT_WE_ASK_BEFORE_WE_STORE
          asked = need_wakeup;
#endif
          store_tail(pushed); /* ring_publish(): __atomic_store_n(ring->sq_tail, RELEASE) */
#ifdef MUTANT_WE_ASK_BEFORE_WE_STORE
          if
          :: asked -> our_fence(); d_step { if :: on_wait_queue -> woken = true :: else fi }
          :: else
          fi;
#else
          if
          :: head != pushed -> wake_if_need_be() /* if (to_submit && needs_wakeup) */
          :: else
          fi;
#endif
          /* Now we wait for a completion, or go on and push more. */
          if
          :: head == pushed /* io_uring_enter(GETEVENTS), which wakes nobody */
          :: true
          fi
       fi
    :: pushed == SQES -> break
    od;
    head == pushed /* deadlock: what was published is never taken */
}

/* What was published is taken in the end, however long the thread stays awake in between. */
ltl taken { [] ((pushed > head) -> <> (head == pushed)) }
