/*
 * Op: one operation that a task awaits. One object is the awaitable, the in-flight entry and the
 * pin of the memory, because creating three objects for these is what takes the time in Python.
 *
 *   FRESH      created and not awaited; the arguments are checked when it is, as in a coroutine
 *   IN_FLIGHT  pushed; the task waits, and the slot has a reference for the kernel
 *   COMPLETE   the completion was dispatched; the task runs soon
 *   DELEGATED  done by a Python coroutine, which gets everything that the task sends
 *   ENDED      like a coroutine that has finished
 *
 * It yields itself, and step.c treats that as a task that waits. It is also the task's abort
 * function for Trio. Only tasks that step.c runs can have an operation in flight, so only step.c
 * gets a yielded operation. In all other tasks, the operation is delegated.
 */
#include "engine.h"

/* The free list. Operations are created often and are tracked by the garbage collector, so they are
 * reused. The list is per process and protected by the GIL, as CPython's free lists are. */
#define FREE_MAX 256
static Op *free_ops[FREE_MAX];
static int free_count;

PyObject *op_new(struct kind *kind, PyObject *owner, PyObject *argument)
{
    Op *op;
    if (free_count > 0)
        op = (Op *)PyObject_Init((PyObject *)free_ops[--free_count], &OpType);
    else
        op = PyObject_GC_New(Op, &OpType);
    if (op == NULL)
        return NULL;
    memset((char *)op + sizeof(PyObject), 0, sizeof *op - sizeof(PyObject));
    op->kind = kind;
    op->opcode = kind->opcode;
    op->cancellable = (char)kind->reads;
    op->owner = Py_NewRef(owner);
    op->argument = Py_NewRef(argument);
    PyObject_GC_Track(op);
    return (PyObject *)op;
}

/* ---- Ending ---------------------------------------------------------------------------- */

/* Release the guard, and the memory unless the kernel may still access it. The current exception is
 * kept: Python's calls may drop it. */
void op_let_go(Op *op)
{
    int in_flight = op->state == IN_FLIGHT;
    int has_view = !in_flight && op->view.obj != NULL;
    if (!has_view && !op->guard_held && (in_flight || !op->pinned))
        return;
    PyObject *error = PyErr_GetRaisedException();
    if (has_view) { /* to release it may run Python code, which must not release it again */
        Py_buffer view = op->view;
        op->view.obj = NULL;
        PyBuffer_Release(&view);
    }
    if (op->guard_held) {
        op->guard_held = 0;
        if (PyObject_SetAttr(op->guard, op->kind->held, Py_False) < 0)
            PyErr_WriteUnraisable(op->guard);
    }
    if (!in_flight && op->pinned) {
        op->pinned = 0;
        PyObject *released = PyObject_CallMethodNoArgs(op->argument, trio.release);
        if (released == NULL)
            PyErr_WriteUnraisable(op->argument);
        Py_XDECREF(released);
    }
    if (error != NULL)
        PyErr_SetRaisedException(error);
}

/* A StopIteration would be taken for op's end. Raise what a coroutine does. */
static void replace_stop_iteration(void)
{
    if (!PyErr_ExceptionMatches(PyExc_StopIteration))
        return;
    PyObject *stop = PyErr_GetRaisedException();
    PyErr_SetString(PyExc_RuntimeError, "coroutine raised StopIteration");
    PyObject *error = PyErr_GetRaisedException();
    PyException_SetCause(error, Py_NewRef(stop)); /* steals the reference, as the next one */
    PyException_SetContext(error, stop);
    PyErr_SetRaisedException(error);
}

/* End with value, whose reference is stolen; with the current exception if it is NULL. */
PySendResult op_end(Op *op, PyObject *value, PyObject **result)
{
    op->state = ENDED;
    *result = value;
    if (value == NULL)
        replace_stop_iteration();
    return value != NULL ? PYGEN_RETURN : PYGEN_ERROR;
}

/* Raise the exception for a completion with an error, in Python. */
PySendResult op_failed(Op *op, PyObject **result)
{
    PyObject *value = PyObject_CallFunctionObjArgs(op->kind->failed, op->loop->manager, op, NULL);
    return op_end(op, value, result);
}

/* Delegate to coroutine, whose reference is stolen; NULL if creating it raised an exception. */
PySendResult op_delegate(Op *op, PyObject *coroutine, PyObject **result)
{
    if (coroutine == NULL)
        return op_end(op, NULL, result);
    op->state = DELEGATED;
    op->delegate = coroutine;
    PySendResult sent = PyIter_Send(coroutine, Py_None, result);
    if (sent != PYGEN_NEXT)
        op->state = ENDED;
    return sent;
}

PySendResult op_twin(Op *op, PyObject **result)
{
    PyObject *coroutine =
        PyObject_CallFunctionObjArgs(op->kind->twin, op->owner, op->argument, NULL);
    return op_delegate(op, coroutine, result);
}

/* Return or raise the result of an operation that is complete. */
PySendResult op_finish(Op *op, PyObject **result)
{
    PySendResult sent = op->kind->finish(op, result);
    if (op->state == ENDED)
        op_let_go(op);
    return sent;
}

/* The task no longer awaits op. If op is in flight, it remains so, and its result is discarded. */
static void op_abandon(Op *op)
{
    Py_CLEAR(op->task);
    if (op->state == COMPLETE)
        op_discard(op);
    if (op->state != IN_FLIGHT)
        op->state = ENDED;
    op_let_go(op);
}

static PySendResult op_send(Op *op, PyObject *value, PyObject **result)
{
    *result = NULL;
    PySendResult sent;
    switch (op->state) {
    case FRESH:
        if (value != Py_None) {
            PyErr_SetString(PyExc_TypeError,
                            "can't send non-None value to a just-started coroutine");
            return PYGEN_ERROR;
        }
        return op->kind->start(op, result);
    case COMPLETE:
        return op_finish(op, result);
    case DELEGATED:
        sent = PyIter_Send(op->delegate, value, result);
        if (sent != PYGEN_NEXT)
            op->state = ENDED;
        return sent;
    case IN_FLIGHT:
        op_abandon(op); /* or its completion would wake the task again */
        PyErr_SetString(PyExc_RuntimeError, "rescheduled while its operation is in flight");
        return PYGEN_ERROR;
    default:
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
        return PYGEN_ERROR;
    }
}

/* ---- The coroutine protocol ------------------------------------------------------------ */

static void set_stop_iteration(PyObject *value)
{
    if (!PyTuple_Check(value) && !PyExceptionInstance_Check(value)) {
        PyErr_SetObject(PyExc_StopIteration, value);
        return;
    }
    /* PyErr_SetObject would treat a tuple as the arguments, and an exception as the exception. */
    PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, value);
    if (stop != NULL) {
        PyErr_SetObject(PyExc_StopIteration, stop);
        Py_DECREF(stop);
    }
}

/* Return what op yields, or NULL with an exception. If op returns a value, the exception is
 * StopIteration, or none if the value is None and quiet is true. */
static PyObject *send_as_iterator(Op *op, PyObject *value, int quiet)
{
    PyObject *result;
    PySendResult sent = op_send(op, value, &result);
    if (sent == PYGEN_NEXT || sent == PYGEN_ERROR)
        return result;
    if (result != Py_None || !quiet)
        set_stop_iteration(result);
    Py_DECREF(result);
    return NULL;
}

static PyObject *op_next(Op *op) { return send_as_iterator(op, Py_None, 1); }
static PyObject *op_send_method(Op *op, PyObject *value) { return send_as_iterator(op, value, 0); }

static PyObject *op_throw(Op *op, PyObject *const *args, Py_ssize_t count)
{
    if (op->state == DELEGATED) {
        PyObject *throw = PyObject_GetAttrString(op->delegate, "throw");
        PyObject *yielded = throw ? PyObject_Vectorcall(throw, args, (size_t)count, NULL) : NULL;
        Py_XDECREF(throw);
        if (yielded == NULL)
            op->state = ENDED;
        return yielded;
    }
    op_abandon(op);
    if (count < 1 || count > 3)
        return PyErr_Format(PyExc_TypeError, "throw expected 1 to 3 arguments, got %zd", count);
    PyObject *type = args[0], *value = count > 1 && args[1] != Py_None ? args[1] : NULL;
    PyObject *traceback = count > 2 && args[2] != Py_None ? args[2] : NULL;
    if (PyExceptionInstance_Check(type) && value == NULL) {
        value = type;
        type = (PyObject *)Py_TYPE(type);
    } else if (!PyExceptionClass_Check(type)) {
        return PyErr_Format(PyExc_TypeError,
                            "exceptions must be classes or instances deriving from "
                            "BaseException, not %s",
                            Py_TYPE(type)->tp_name);
    }
    if (traceback == NULL && value != NULL && PyExceptionInstance_Check(value))
        traceback = PyException_GetTraceback(value);
    else
        Py_XINCREF(traceback);
    PyErr_Restore(Py_NewRef(type), Py_XNewRef(value), traceback);
    return NULL;
}

static PyObject *op_close(Op *op, PyObject *unused)
{
    PyObject *closed = Py_NewRef(Py_None);
    if (op->state == DELEGATED)
        Py_SETREF(closed, PyObject_CallMethod(op->delegate, "close", NULL));
    op_abandon(op);
    return closed;
}

/* ---- Cancellation ---------------------------------------------------------------------- */

/* Request the cancellation of op from Python, which has a queue in case there is no room. */
int op_ask_cancel(Op *op)
{
    if (op->state != IN_FLIGHT || !op->cancellable)
        return 0;
    PyObject *asked = PyObject_CallMethod(op->loop->manager, "request_cancel", "O", op);
    Py_XDECREF(asked);
    return asked == NULL ? -1 : 0;
}

/* As InFlight.abort: Trio calls it to cancel the task. */
static PyObject *op_abort(Op *op, PyObject *args, PyObject *kwargs)
{
    PyObject *raise_cancel;
    if (!PyArg_ParseTuple(args, "O", &raise_cancel))
        return NULL;
    if (op->kind->shielded)
        return Py_NewRef(trio.abort_failed);
    if (!op->closing)
        Py_XSETREF(op->raise_cancel, Py_NewRef(raise_cancel));
    return op_ask_cancel(op) < 0 ? NULL : Py_NewRef(trio.abort_failed);
}

/* As InFlight.fd_closing: the fd is about to be closed. */
static PyObject *op_fd_closing(Op *op, PyObject *unused)
{
    op->closing = op->raise_cancel == NULL;
    if (op_ask_cancel(op) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* As InFlight.finish_cancelled: called before another operation starts. */
static PyObject *op_finish_cancelled(Op *op, PyObject *unused)
{
    if (op->state != IN_FLIGHT || !op->cancel_asked)
        Py_RETURN_NONE;
    PyObject *ended =
        PyObject_CallMethod(op->loop->manager, "finish_cancelled", "K", op->user_data);
    int left = ended == NULL ? -1 : ended == Py_True ? loop_leave_waiters(op->loop, op) : 0;
    Py_XDECREF(ended);
    if (left < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *op_get_operation(Op *op, void *unused)
{
    if (op->loop == NULL)
        Py_RETURN_NONE;
    if (op->kind->described)
        return Py_NewRef(op->argument);
    return Py_NewRef(op->kind->reads ? op->loop->receive_operation : op->loop->send_operation);
}

/* ---- The type -------------------------------------------------------------------------- */

static int op_traverse(Op *op, visitproc visit, void *arg)
{
    Py_VISIT(op->loop);
    Py_VISIT(op->owner);
    Py_VISIT(op->argument);
    Py_VISIT(op->task);
    Py_VISIT(op->raise_cancel);
    Py_VISIT(op->guard);
    Py_VISIT(op->received);
    Py_VISIT(op->delegate);
    if (op->state != IN_FLIGHT)
        Py_VISIT(op->view.obj);
    return 0;
}

static int op_clear(Op *op)
{
    op_let_go(op);
    Py_CLEAR(op->loop);
    Py_CLEAR(op->owner);
    Py_CLEAR(op->argument);
    Py_CLEAR(op->fd);
    Py_CLEAR(op->task);
    Py_CLEAR(op->raise_cancel);
    Py_CLEAR(op->guard);
    Py_CLEAR(op->received);
    Py_CLEAR(op->delegate);
    return 0;
}

static void op_dealloc(Op *op)
{
    PyObject_GC_UnTrack(op);
    if (op->state == FRESH) {
        PyObject *error = PyErr_GetRaisedException();
        if (PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "coroutine '%s' was never awaited",
                             op->kind->name) < 0)
            PyErr_WriteUnraisable(op->owner);
        if (error != NULL)
            PyErr_SetRaisedException(error);
    }
    op_clear(op);
    if (free_count < FREE_MAX)
        free_ops[free_count++] = op;
    else
        PyObject_GC_Del(op);
}

static PyObject *op_repr(Op *op)
{
    static const char *const states[] = {"not awaited", "in flight", "complete", "delegated",
                                         "ended"};
    return PyUnicode_FromFormat("<%s, %s>", op->kind->name, states[op->state]);
}

static PyMethodDef op_methods[] = {
    {"send", (PyCFunction)op_send_method, METH_O, NULL},
    {"throw", (PyCFunction)(void *)op_throw, METH_FASTCALL, NULL},
    {"close", (PyCFunction)op_close, METH_NOARGS, NULL},
    {"fd_closing", (PyCFunction)op_fd_closing, METH_NOARGS, NULL},
    {"finish_cancelled", (PyCFunction)op_finish_cancelled, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* With cr_frame and cr_await, Task.iter_await_frames finds the frames of the twin. */
static PyMemberDef op_members[] = {
    {"user_data", T_ULONGLONG, offsetof(Op, user_data), READONLY, NULL},
    {"since", T_LONGLONG, offsetof(Op, since), READONLY, NULL},
    {"res", T_INT, offsetof(Op, res), READONLY, NULL},
    {"flags", T_UINT, offsetof(Op, flags), READONLY, NULL},
    {"cancel_asked", T_BOOL, offsetof(Op, cancel_asked), 0, NULL},
    {"closing", T_BOOL, offsetof(Op, closing), READONLY, NULL},
    {"raise_cancel", T_OBJECT, offsetof(Op, raise_cancel), READONLY, NULL},
    {"fd", T_OBJECT, offsetof(Op, fd), READONLY, NULL},
    {"owner", T_OBJECT, offsetof(Op, owner), READONLY, NULL},
    {"cr_await", T_OBJECT, offsetof(Op, delegate), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyObject *op_no_frame(Op *op, void *unused) { Py_RETURN_NONE; }

static PyGetSetDef op_getset[] = {
    {"operation", (getter)op_get_operation, NULL, NULL, NULL},
    {"cr_frame", (getter)op_no_frame, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyAsyncMethods op_as_async = {
    .am_await = PyObject_SelfIter,
    .am_send = (sendfunc)op_send,
};

PyTypeObject OpType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "trio_uring._kernel._native.Op",
    .tp_basicsize = sizeof(Op),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_dealloc = (destructor)op_dealloc,
    .tp_traverse = (traverseproc)op_traverse,
    .tp_clear = (inquiry)op_clear,
    .tp_repr = (reprfunc)op_repr,
    .tp_call = (ternaryfunc)op_abort,
    .tp_as_async = &op_as_async,
    .tp_iter = PyObject_SelfIter,
    .tp_iternext = (iternextfunc)op_next,
    .tp_methods = op_methods,
    .tp_members = op_members,
    .tp_getset = op_getset,
};
