/*
 * Any operation, as Python describes it: `InFlightTable.perform` and `perform_shielded`.
 *
 * Ring.push pushes the SQE, because only cffi knows the address of the memory. What is unusual is
 * delegated: several completions, provided buffers, a second fd, an fd that another task waits for,
 * and no room.
 */
#include "engine.h"

static int is_true(PyObject *operation, Py_ssize_t offset)
{
    return SLOT(operation, offset) == Py_True;
}

/* Whether the current task may push operation. */
static int is_ordinary(Op *op, Loop *loop)
{
    PyObject *operation = op->argument;
    if (loop == NULL || loop->manager != op->owner ||
        Py_TYPE(operation) != trio.operation_type || (!op->kind->shielded && is_cancelled(loop)))
        return 0;
    PyObject *second_fd = SLOT(operation, trio.second_fd);
    return !is_true(operation, trio.spent) && SLOT(operation, trio.on_cqe_more) == Py_None &&
           SLOT(operation, trio.buffers) == Py_None &&
           PyTuple_CheckExact(SLOT(operation, trio.sqe)) &&
           PyTuple_CheckExact(SLOT(operation, trio.pins)) &&
           PyLong_CheckExact(SLOT(operation, trio.operation_fd)) &&
           PyLong_CheckExact(second_fd) && PyLong_AsLong(second_fd) == -1;
}

/* Acquire a token of the limiter, if operation needs one. Returns 0 if there is none. */
static int acquire_token(Op *op, Loop *loop)
{
    if (!is_true(op->argument, trio.limited))
        return 1;
    PyObject *acquired = PyObject_CallMethodNoArgs(loop->limiter, trio.try_acquire);
    Py_XDECREF(acquired);
    op->limited = acquired == Py_True;
    return acquired == NULL ? -1 : op->limited;
}

/* Release the token. Returns -1 with an exception. */
int op_release_token(Op *op)
{
    if (!op->limited)
        return 0;
    op->limited = 0;
    PyObject *released = PyObject_CallMethodNoArgs(op->loop->limiter, trio.release);
    Py_XDECREF(released);
    return released == NULL ? -1 : 0;
}

/* Put the SQE in the SQ by Ring.push, as the Python engine does. Returns 0 if there is no room. */
static int push_sqe(Op *op, Loop *loop)
{
    PyObject *user_data = PyLong_FromUnsignedLongLong(op->user_data);
    PyObject *pushed = NULL;
    if (user_data != NULL)
        pushed = PyObject_CallMethodObjArgs(loop->python_ring, trio.push, op->argument, user_data,
                                            NULL);
    Py_XDECREF(user_data);
    Py_XDECREF(pushed);
    return pushed == NULL ? -1 : pushed == Py_True;
}

/* Push the operation for the current task. Returns 0 if it must be delegated; -1 with an
 * exception. */
static int push_operation(Op *op, Loop *loop)
{
    PyObject *operation = op->argument, *fd = SLOT(operation, trio.operation_fd);
    PyObject *opcode = PyTuple_GetItem(SLOT(operation, trio.sqe), 0);
    if (opcode == NULL)
        return -1;
    if (!loop_reserve_slot(loop, op))
        return 0;
    op->opcode = (uint8_t)PyLong_AsLong(opcode);
    op->cancellable = (char)is_true(operation, trio.cancellable);
    int pushed = 1;
    if (op->cancellable && is_true(operation, trio.acts_on_fd) && PyLong_AsLong(fd) >= 0)
        pushed = loop_enter_waiter(loop, op, fd);
    if (pushed == 1)
        pushed = push_sqe(op, loop);
    if (pushed == 1) {
        loop_fill_slot(loop, op);
        if (PyTuple_GET_SIZE(SLOT(operation, trio.pins)) > 0) {
            op->pinned = 1;
            Py_SETREF(SLOT(operation, trio.spent), Py_NewRef(Py_True));
        }
        return 1;
    }
    loop_free_slot(loop, op);
    PyObject *error = PyErr_GetRaisedException();
    if (loop_leave_waiters(loop, op) < 0)
        pushed = -1;
    if (error != NULL)
        PyErr_SetRaisedException(error);
    return pushed;
}

static PySendResult start_perform(Op *op, PyObject **result)
{
    Loop *loop = current_loop();
    int pushed = is_ordinary(op, loop) ? acquire_token(op, loop) : 0;
    if (pushed == 1) {
        pushed = push_operation(op, loop);
        if (pushed != 1) { /* the twin acquires a token itself */
            PyObject *error = pushed < 0 ? PyErr_GetRaisedException() : NULL;
            op->loop = op->limited ? (Loop *)Py_NewRef((PyObject *)loop) : NULL;
            if (op_release_token(op) < 0)
                pushed = -1;
            if (error != NULL)
                PyErr_SetRaisedException(error);
        }
    }
    if (pushed == 0)
        return op_twin(op, result);
    if (pushed < 0) { /* it was used, as in the Python engine */
        op->pinned = PyTuple_GET_SIZE(SLOT(op->argument, trio.pins)) > 0;
        op_let_go(op);
        return op_end(op, NULL, result);
    }
    *result = Py_NewRef((PyObject *)op);
    return PYGEN_NEXT;
}

static PySendResult finish_perform(Op *op, PyObject **result)
{
    if (op->res == -EINTR && op->kind->shielded && !op->closing) {
        op->pinned = 0; /* the coroutine releases the pins */
        PyObject *again =
            PyObject_CallFunctionObjArgs(op->kind->rest, op->owner, op->argument, NULL);
        return op_delegate(op, again, result);
    }
    if (op->res < 0)
        return op_failed(op, result);
    return op_end(op,
                  PyObject_CallFunction(SLOT(op->argument, trio.decode), "iI", (int)op->res,
                                        (unsigned)op->flags),
                  result);
}

/* No task gets the result. If it is an fd, it is closed. */
void op_discard(Op *op)
{
    PyObject *discard = op->kind->described ? SLOT(op->argument, trio.discard) : Py_None;
    if (op->res < 0 || discard == Py_None)
        return;
    PyObject *error = PyErr_GetRaisedException();
    PyObject *discarded = PyObject_CallFunction(discard, "i", (int)op->res);
    if (discarded == NULL)
        PyErr_WriteUnraisable(discard);
    Py_XDECREF(discarded);
    if (error != NULL)
        PyErr_SetRaisedException(error);
}

struct kind perform = {
    .name = "perform", .described = 1, .start = start_perform, .finish = finish_perform};
struct kind perform_shielded = {.name = "perform_shielded",
                                .described = 1,
                                .shielded = 1,
                                .start = start_perform,
                                .finish = finish_perform};
