/*
 * The native engine: C code for what runs once per operation, per completion and per task step.
 *
 * The C code handles only the common case, which succeeds. Everything else (a closed socket, a
 * cancelled task, unusual arguments, an error, a run without a ring) is delegated to the Python
 * function of the same name, its twin. The twin is the specification. See op.c.
 *
 *   module.c    the module: setup by Python, and the functions that Python imports
 *   step.c      runs a task's step, in place of Trio's loop, and reschedules tasks
 *   loop.c      the engine's state of one run: slots, fetching and dispatching completions
 *   op.c        one awaitable operation
 *   sockets.c   receiving and sending: the SQEs, and the results
 *   perform.c   any other operation, as Python describes it
 *   files.c     reads from the page cache
 *   hits.c      calls on files that need not wait
 *   paths.c     calls on paths that need not wait
 *   opened.c    opening files to read them, and closing them
 *
 * Everything here runs with the GIL held. Errors are Python exceptions.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <Python.h>
#include <structmember.h>

#include "engine_api.h"

typedef struct Op Op;
typedef struct Loop Loop;

/* What Python passed to setup(): offsets of Trio's slots, objects, and names of attributes. */
struct trio {
    PyTypeObject *task_type, *runner_type, *status_type, *wait_type;
    PyTypeObject *manager_type, *socket_type; /* our classes, used in place of Trio's */
    PyObject *checkpoint;    /* the message of a shielded checkpoint */
    PyObject *value, *error; /* outcome.Value and outcome.Error */
    PyObject *abort_failed;
    PyObject *context; /* GLOBAL_RUN_CONTEXT */
    Py_ssize_t next_send_fn, next_send, abort_func, custom_sleep_data, cancel_status, coro,
        task_context, schedule_points, cancel_points;    /* of a task */
    Py_ssize_t effectively_cancelled;                    /* of a cancel status */
    Py_ssize_t ki_pending, main_task, runq, instruments, io_manager; /* of a runner */
    PyTypeObject *operation_type;
    Py_ssize_t sqe, operation_fd, pins, spent, cancellable, limited, decode, discard, on_cqe_more,
        second_fd, acts_on_fd, buffers; /* of an operation as Python describes it */
    /* the names of attributes */
    PyObject *deliver_cancel, *deliver_ki, *socket, *stdlib_socket, *fileno, *is_stream,
        *did_shutdown, *push, *release, *try_acquire;
};
extern struct trio trio;
extern const struct engine_api *api;

#define SLOT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

/* ---- op.c ------------------------------------------------------------------------------ */

/* A kind of operation. start and finish return the same as PyIter_Send; with PYGEN_NEXT, the result
 * is the operation itself. */
struct kind {
    const char *name;
    uint8_t opcode;
    int described;  /* Python describes the operation: perform.c */
    int reads;      /* it waits for data, so it is cancellable, and exclusive on its fd */
    int shielded;   /* it ignores that its task is cancelled */
    PySendResult (*start)(Op *, PyObject **result);
    PySendResult (*finish)(Op *, PyObject **result);
    PyObject *twin;   /* the Python function that it is delegated to */
    PyObject *rest;   /* the Python function that does what the kernel left undone */
    PyObject *failed; /* the Python function that raises the exception for an error */
    /* Of a kind for streams: the names of the stream's socket, of the socket's method that the stream
     * would call, of the guard that one task at a time may hold, and of the guard's attribute that
     * says whether it is held. The method must still be the engine's own function. */
    PyObject *socket, *method, *function, *guard, *held;
    PyTypeObject *guard_type;
};

enum state { FRESH, IN_FLIGHT, COMPLETE, DELEGATED, ENDED };

struct Op {
    PyObject_HEAD
    struct kind *kind;
    enum state state;
    char cancel_asked, closing; /* as in InFlight, for Python */
    char guard_held;            /* whether this operation holds guard */
    char cancellable;           /* whether the kernel can be asked to stop it */
    char limited, pinned;       /* whether it holds a token of the limiter, and Python's pins */
    uint8_t opcode;
    int32_t res;
    uint32_t flags;
    unsigned long long user_data;
    int64_t since;          /* when it was pushed, in ns; 0 if loop does not time operations */
    Loop *loop;             /* NULL until it is pushed */
    PyObject *owner;        /* the socket or stream */
    PyObject *argument;     /* the size, the data, or Python's Operation */
    PyObject *fd;           /* its key in the fd waiters; NULL if it is not registered */
    PyObject *task;         /* the waiting task; NULL if there is none */
    PyObject *raise_cancel; /* set if the task was cancelled */
    PyObject *guard;        /* the stream's guard, of a kind that has one */
    PyObject *received;     /* the received bytes, copied when the completion was dispatched */
    PyObject *delegate;     /* the coroutine of a Python function, if delegated */
    Py_buffer view;         /* what is sent, or the memory to receive into; view.obj may be NULL */
};
extern PyTypeObject OpType;

PyObject *op_new(struct kind *, PyObject *owner, PyObject *argument);
PySendResult op_delegate(Op *, PyObject *coroutine, PyObject **result);
PySendResult op_twin(Op *, PyObject **result);
PySendResult op_end(Op *, PyObject *value, PyObject **result);
PySendResult op_failed(Op *, PyObject **result);
PySendResult op_finish(Op *, PyObject **result);
int op_ask_cancel(Op *);
void op_let_go(Op *);

/* ---- loop.c ---------------------------------------------------------------------------- */

/* An operation in flight has a slot. Its user_data consists of NATIVE, the slot's generation and
 * the slot's index. Each operation in a slot has another generation. user_data is not a pointer,
 * because a message from another ring can have any user_data. */
#define NATIVE (1ULL << 62)
#define GENERATIONS (1u << 30)
struct slot {
    Op *op; /* a reference for the kernel; NULL if the slot is free */
    uint32_t generation;
    uint32_t next_free;
};

struct Loop {
    PyObject_HEAD
    struct ring *ring;
    PyObject *manager;    /* the I/O manager, which cancels operations and owns the ring */
    PyObject *waiters;    /* the FdWaiters, shared with Python */
    PyObject *registered; /* the fds with tasks waiting in epoll */
    PyObject *python_ring; /* pushes what Python describes */
    PyObject *limiter;    /* limits the operations on files */
    PyObject *receive_operation, *send_operation; /* the `operation` of each Op, for Python */

    /* The pool of provided buffers; NULL until receive_into(). */
    struct buffer_ring *pool;
    char *memory;
    PyObject *memory_owner;
    Py_ssize_t buffer_size;
    uint32_t *consumed; /* the used bytes of each incremental buffer; NULL if not incremental */
    unsigned group;

    PyObject *runner;
    PyObject *hooks;   /* the hooks of the runner's instruments; only "_all" if there are none */
    PyObject *wake;    /* the append method of the runner's run queue */
    PyObject *context; /* Trio's context of this thread, with the current task; during a step */
    PyObject *batch;   /* the tasks that have not run in this iteration, borrowed; during a step */
    PyObject *queue;   /* the runner's run queue: the tasks of the next loop iteration */
    int may_send_now;  /* see loop_is_quiet() */
    int64_t budget, budget_end; /* in ns: the turn budget, and when it ends; 0 if not started */
    PyObject *task;    /* the current task, borrowed; during a step */

    struct slot *slots;
    uint32_t slot_count, first_free, in_flight;
    struct io_uring_cqe *cqes; /* those from cqe_next to cqe_count are not dispatched yet */
    uint32_t cqe_room, cqe_next, cqe_count;
    unsigned long long sent_now; /* the number of sends without the ring */
    unsigned long long completed[256]; /* the numbers of completions by opcode */
    char has_files;                  /* whether the run uses the ring for files */
    char times_operations;           /* whether it sets `since` of each Op */
    unsigned long long file_hits;    /* the number of calls on files and paths without the ring */
};
extern PyTypeObject LoopType;

int loop_enter_waiter(Loop *, Op *, PyObject *fd);
int loop_leave_waiters(Loop *, Op *);
int loop_reserve_slot(Loop *, Op *);
void loop_free_slot(Loop *, Op *);
void loop_fill_slot(Loop *, Op *);
int loop_push(Loop *, Op *, struct sqe_fields *, PyObject *fd);

/* ---- step.c ---------------------------------------------------------------------------- */

int64_t nanoseconds(void); /* of the monotonic clock */
Loop *current_loop(void);
int is_cancelled(Loop *);
int loop_is_quiet(Loop *);
int within_budget(Loop *);
int pass_cancel_point(Loop *);
int reschedule(Loop *, PyObject *task, PyObject *value);
PyObject *make_steps(PyObject *module, PyObject *const *args, Py_ssize_t count);
int init_step(void);

/* ---- sockets.c ------------------------------------------------------------------------- */

extern struct kind socket_recv, socket_recv_into, socket_send, socket_attempt, stream_receive_some,
    stream_send_all, anyio_receive, anyio_send;

/* ---- perform.c ------------------------------------------------------------------------- */

extern struct kind perform, perform_shielded;
void op_discard(Op *);
int op_release_token(Op *);

/* ---- files.c --------------------------------------------------------------------------- */

PyObject *read_cached(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *read_many_cached(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* ---- hits.c ---------------------------------------------------------------------------- */

extern PyTypeObject FileHitType;
extern PyObject *otherwise; /* what a call returns if Python must make it */
extern PyObject *era;       /* the value of `direct` of files that may be read directly */
PyObject *set_files(PyObject *module, PyObject *args);
PyObject *set_era(PyObject *module, PyObject *era);

/* ---- paths.c --------------------------------------------------------------------------- */

PyObject *set_paths(PyObject *module, PyObject *args);
PyObject *call_path(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *after_call(Loop *, PyObject *value);

/* ---- opened.c -------------------------------------------------------------------------- */

PyObject *set_opened(PyObject *module, PyObject *args);
PyObject *file_to_read(int fd, PyObject *path, uint64_t mount, PyObject *encoding);
PyObject *close_file(PyObject *module, PyObject *file);

/* ---- For Python before 3.12 --------------------------------------------------------------- */

#if PY_VERSION_HEX < 0x030c0000
static inline PyObject *PyErr_GetRaisedException(void)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (type == NULL)
        return NULL;
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(value, traceback);
    Py_DECREF(type);
    Py_XDECREF(traceback);
    return value;
}

static inline void PyErr_SetRaisedException(PyObject *error)
{
    PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(error)), error, PyException_GetTraceback(error));
}
#endif

#endif
