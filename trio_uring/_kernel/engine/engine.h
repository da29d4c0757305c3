/*
 * The native engine: what runs once per operation, per completion and per step of a task, in C.
 *
 * C does only the case that succeeds. Whatever is not plain (a closed socket, a cancelled task,
 * odd arguments, an error) goes to the Python function of the same name, its twin, which is the
 * specification; so does everything outside of a run with a ring. See op.c.
 *
 *   module.c    what Python gives at the start; the names that Python imports
 *   step.c      a task's step, as Trio's loop makes it, and waking a task
 *   loop.c      a run's part of the engine: slots, the turn, completions
 *   op.c        one awaitable operation
 *   sockets.c   receiving and sending: what is pushed, and what is made of the result
 *
 * Everything here runs with the GIL held. Errors are Python's.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <Python.h>
#include <structmember.h>

#include "engine_api.h"

typedef struct Op Op;
typedef struct Loop Loop;

/* What Python gave with setup(): the offsets of Trio's slots, and its objects. */
struct trio {
    PyTypeObject *task_type, *runner_type, *status_type, *wait_type, *detector_type;
    PyTypeObject *manager_type, *socket_type; /* ours, in the place of Trio's */
    PyObject *checkpoint;    /* the message of a shielded checkpoint */
    PyObject *value, *error; /* outcome.Value and outcome.Error */
    PyObject *abort_failed;
    PyObject *context; /* GLOBAL_RUN_CONTEXT */
    Py_ssize_t next_send_fn, next_send, abort_func, custom_sleep_data, cancel_status, coro,
        task_context, schedule_points, cancel_points;    /* of a task */
    Py_ssize_t effectively_cancelled;                    /* of a cancel status */
    Py_ssize_t ki_pending, main_task, runq, instruments, io_manager; /* of a runner */
    /* the names of attributes */
    PyObject *deliver_cancel, *deliver_ki, *socket, *stdlib_socket, *fileno, *is_stream,
        *send_conflict_detector, *held, *did_shutdown;
};
extern struct trio trio;
extern const struct engine_api *api;

#define SLOT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

/* ---- op.c ------------------------------------------------------------------------------ */

/* What an operation does. Each returns as PyIter_Send does; NEXT with the operation itself. */
struct kind {
    const char *name;
    uint8_t opcode;
    int reads;   /* it waits: it can be cancelled, and only one at a time may on an fd */
    PySendResult (*start)(Op *, PyObject **result);
    PySendResult (*finish)(Op *, PyObject **result);
    PyObject *twin;   /* the Python function, for all that is not plain */
    PyObject *rest;   /* goes on with what the kernel did only in part, or not at all */
    PyObject *failed; /* raises what a completion with an error means */
};

enum state { FRESH, IN_FLIGHT, COMPLETE, DELEGATED, ENDED };

struct Op {
    PyObject_HEAD
    struct kind *kind;
    enum state state;
    char cancel_asked, closing; /* as in InFlight, for Python */
    char detector_held;
    int32_t res;
    uint32_t flags;
    unsigned long long user_data;
    Loop *loop;             /* since it was pushed */
    PyObject *owner;        /* the socket or stream */
    PyObject *argument;     /* the size, or the data */
    PyObject *fd;           /* under which it stands among those who wait, or NULL */
    PyObject *task;         /* while it waits; NULL if nobody does */
    PyObject *raise_cancel; /* once the task was cancelled */
    PyObject *detector;     /* of a stream's send_all */
    PyObject *received;     /* copied out when the completion came */
    PyObject *delegate;     /* the twin's coroutine */
    Py_buffer view;         /* view.obj is NULL if there is none */
};
extern PyTypeObject OpType;

PyObject *op_new(struct kind *, PyObject *owner, PyObject *argument);
PySendResult op_delegate(Op *, PyObject *coroutine, PyObject **result);
PySendResult op_twin(Op *, PyObject **result);
PySendResult op_end(Op *, PyObject *value, PyObject **result);
PySendResult op_failed(Op *, PyObject **result);
int op_ask_cancel(Op *);
void op_let_go(Op *);

/* ---- loop.c ---------------------------------------------------------------------------- */

/* Where an operation waits for its completion. Its user_data: NATIVE, the slot's generation, which
 * no two operations in it share, and the slot. Never a pointer: another ring's message can have
 * any user_data. */
#define NATIVE (1ULL << 62)
#define GENERATIONS (1u << 30)
struct slot {
    Op *op; /* the kernel's reference; NULL while free */
    uint32_t generation;
    uint32_t next_free;
};

struct Loop {
    PyObject_HEAD
    struct ring *ring;
    PyObject *manager;    /* cancels, and keeps the ring */
    PyObject *waiters;    /* by fd, who waits on it: Python's table, and the only one */
    PyObject *registered; /* by fd, who waits in epoll */
    PyObject *receive_operation, *send_operation; /* what Python reads of an operation */

    /* The buffers that receives share; NULL until there are some. */
    struct buffer_ring *pool;
    char *memory;
    PyObject *memory_owner;
    Py_ssize_t buffer_size;
    uint32_t *consumed; /* of each buffer, where they are incremental; or NULL */
    unsigned group;

    PyObject *runner;
    PyObject *hooks;   /* of the runner's instruments: only "_all" where there is none */
    PyObject *wake;    /* the append of its queue of tasks */
    PyObject *context; /* of this thread, where Trio says which task runs; during a step */
    PyObject *task;    /* the task that runs, borrowed; during a step */

    struct slot *slots;
    uint32_t slot_count, first_free, in_flight;
    struct io_uring_cqe *cqes; /* fetched, and not dispatched yet: from cqe_next to cqe_count */
    uint32_t cqe_room, cqe_next, cqe_count;
    unsigned long long completed[2]; /* sends, and what reads */
};
extern PyTypeObject LoopType;

int loop_leave_waiters(Loop *, Op *);
int loop_push(Loop *, Op *, struct sqe_fields *, PyObject *fd);

/* ---- step.c ---------------------------------------------------------------------------- */

Loop *current_loop(void);
int is_cancelled(Loop *);
int reschedule(Loop *, PyObject *task, PyObject *value);
PyObject *make_steps(PyObject *module, PyObject *const *args, Py_ssize_t count);
int init_step(void);

/* ---- sockets.c ------------------------------------------------------------------------- */

extern struct kind socket_recv, socket_send, stream_receive_some, stream_send_all;

/* ---- What older Pythons lack ------------------------------------------------------------- */

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
