/*
 * Receiving and sending: the SQEs, and the results.
 *
 * A receive is a multishot receive with a limit of one completion: `optlen`, byte 44 of the SQE
 * (Linux 6.17; Python tests that once before it passes us buffers). It receives like a one-shot
 * receive, but after spurious wakeups it stays in the kernel's poll queue. The kernel gives a
 * one-shot receive to a worker after some of them.
 *
 * A send never waits in the kernel. If the socket is full, Python continues, and waits until the
 * socket is writable.
 */
#include "engine.h"

#include <sys/socket.h>

#define OP_SEND 26 /* IORING_OP_SEND */
#define OP_RECV 27 /* IORING_OP_RECV */
#define IO_MAX 0x7ffff000 /* the most that the kernel sends at once: MAX_RW_COUNT */

/* The socket's fd as an int; NULL without an exception if it has none or is of another type. */
static PyObject *fd_of(PyObject *socket)
{
    PyObject *stdlib = NULL, *fd = NULL;
    if (Py_TYPE(socket) == trio.socket_type)
        stdlib = PyObject_GetAttr(socket, trio.stdlib_socket);
    if (stdlib != NULL)
        fd = PyObject_CallMethodNoArgs(stdlib, trio.fileno);
    Py_XDECREF(stdlib);
    if (fd != NULL && (!PyLong_CheckExact(fd) || PyLong_AsLong(fd) < 0))
        Py_CLEAR(fd);
    PyErr_Clear();
    return fd;
}

/* The loop for which the current task may push; NULL if there is none, or the task is cancelled. */
static Loop *plain_loop(void)
{
    Loop *loop = current_loop();
    return loop == NULL || is_cancelled(loop) ? NULL : loop;
}

/* If op is in flight, the task waits for it. If op is complete, the task executes a schedule point,
 * or continues without one within the turn budget. It cannot be cancelled there. */
static PySendResult wait_or_finish(Op *op, PyObject **result)
{
    if (op->state == IN_FLIGHT) {
        *result = Py_NewRef((PyObject *)op);
        return PYGEN_NEXT;
    }
    int skipped = pass_cancel_point(op->loop);
    if (skipped < 0)
        return op_end(op, NULL, result);
    if (skipped)
        return op_finish(op, result);
    *result = Py_NewRef(trio.checkpoint);
    return PYGEN_NEXT;
}

/* ---- Streams --------------------------------------------------------------------------- */

/* Whether the socket has the method that the engine stands in for, and not one that a program has
 * put into its place. */
static int has_own_method(PyObject *socket, struct kind *kind)
{
    PyObject *method = PyObject_GetAttr(socket, kind->method);
    int own = method != NULL && Py_TYPE(method) == &PyMethod_Type &&
              PyMethod_GET_FUNCTION(method) == kind->function;
    if (method == NULL)
        PyErr_Clear();
    Py_XDECREF(method);
    return own;
}

/* The stream's socket, if it is one of our sockets; NULL without an exception if not. */
static PyObject *socket_of(Op *op)
{
    PyObject *socket = PyObject_GetAttr(op->owner, op->kind->socket);
    if (socket == NULL)
        PyErr_Clear();
    else if (Py_TYPE(socket) != trio.socket_type || !has_own_method(socket, op->kind))
        Py_CLEAR(socket);
    return socket;
}

static int attribute_is(PyObject *object, PyObject *name, PyObject *expected)
{
    PyObject *value = PyObject_GetAttr(object, name);
    if (value == NULL)
        PyErr_Clear();
    Py_XDECREF(value);
    return value == expected;
}

/* Acquire the stream's guard, so that no other task can do the same meanwhile. */
static int hold_guard(Op *op)
{
    op->guard = PyObject_GetAttr(op->owner, op->kind->guard);
    if (op->guard == NULL || Py_TYPE(op->guard) != op->kind->guard_type ||
        !attribute_is(op->guard, op->kind->held, Py_False) ||
        PyObject_SetAttr(op->guard, op->kind->held, Py_True) < 0) {
        PyErr_Clear();
        return 0;
    }
    op->guard_held = 1;
    return 1;
}

/* Delegate to the twin, which acquires the guard itself. */
static PySendResult let_go_and_twin(Op *op, PyObject **result)
{
    op_let_go(op);
    return op_twin(op, result);
}

/* ---- Receiving ------------------------------------------------------------------------- */

/* Push a receive of at most size bytes, or delegate to the twin. */
static PySendResult start_receive(Op *op, PyObject *socket, Py_ssize_t size, PyObject **result)
{
    Loop *loop = plain_loop();
    PyObject *fd = NULL;
    int pushed = 0;
    if (loop != NULL && loop->pool != NULL && 0 < size && size <= loop->buffer_size)
        fd = fd_of(socket);
    if (fd != NULL) {
        struct sqe_fields sqe = {
            .sqe_flags = IOSQE_BUFFER_SELECT,
            .ioprio = IORING_RECV_MULTISHOT,
            .fd = (int32_t)PyLong_AsLong(fd),
            .len = (uint32_t)size,
            .buf_index = (uint16_t)loop->group,
            .splice_fd_in = 1, /* optlen */
        };
        pushed = loop_push(loop, op, &sqe, fd);
        Py_DECREF(fd);
    }
    if (pushed < 0) {
        op_let_go(op);
        return op_end(op, NULL, result);
    }
    if (pushed == 0)
        return let_go_and_twin(op, result);
    *result = Py_NewRef((PyObject *)op);
    return PYGEN_NEXT;
}

/* The size; 0, with which the receive is delegated, if it is not an int or too large. */
static Py_ssize_t size_of(PyObject *argument)
{
    Py_ssize_t size = PyLong_CheckExact(argument) ? PyLong_AsSsize_t(argument) : 0;
    if (size == -1 && PyErr_Occurred())
        PyErr_Clear();
    return size;
}

/* Only for stream sockets: a receive in flight would keep the port of a datagram socket in use. */
static PySendResult start_recv(Op *op, PyObject **result)
{
    if (!attribute_is(op->owner, trio.is_stream, Py_True))
        return op_twin(op, result);
    return start_receive(op, op->owner, size_of(op->argument), result);
}

static PySendResult start_receive_some(Op *op, PyObject **result)
{
    Py_ssize_t size = op->argument == Py_None ? 65536 : size_of(op->argument);
    PyObject *socket = socket_of(op);
    if (socket == NULL)
        return op_twin(op, result);
    PySendResult sent = start_receive(op, socket, size, result);
    Py_DECREF(socket);
    return sent;
}

/* AnyIO's streams include sockets of messages, such as SOCK_SEQPACKET. */
static PySendResult start_anyio_receive(Op *op, PyObject **result)
{
    PyObject *socket = socket_of(op);
    PySendResult sent;
    if (socket != NULL && attribute_is(socket, trio.is_stream, Py_True) && hold_guard(op))
        sent = start_receive(op, socket, size_of(op->argument), result);
    else
        sent = op_twin(op, result);
    Py_XDECREF(socket);
    return sent;
}

/* The argument is a tuple: the memory to receive into, and how many bytes at most, or 0. */
static PySendResult start_recv_into(Op *op, PyObject **result)
{
    PyObject *memory;
    Py_ssize_t size;
    if (!attribute_is(op->owner, trio.is_stream, Py_True) ||
        !PyArg_ParseTuple(op->argument, "On", &memory, &size) ||
        PyObject_GetBuffer(memory, &op->view, PyBUF_WRITABLE) < 0) {
        PyErr_Clear();
        op->view.obj = NULL;
        return op_twin(op, result);
    }
    if (0 <= size && size <= op->view.len)
        return start_receive(op, op->owner, size > 0 ? size : op->view.len, result);
    return let_go_and_twin(op, result);
}

static PySendResult finish_receive(Op *op, PyObject **result)
{
    if (op->res == -ENOBUFS || op->res == -EAGAIN) {
        PyObject *coroutine = PyObject_CallFunctionObjArgs(op->kind->rest, op->loop->manager, op,
                                                           op->owner, op->argument, NULL);
        if (coroutine != NULL)
            op->guard_held = 0; /* the coroutine releases it */
        return op_delegate(op, coroutine, result);
    }
    if (op->res < 0)
        return op_failed(op, result);
    PyObject *received = op->received;
    op->received = NULL;
    if (received == NULL)
        PyErr_NoMemory();
    return op_end(op, received, result);
}

static PySendResult finish_recv_into(Op *op, PyObject **result)
{
    return op->res >= 0 ? op_end(op, PyLong_FromLong(op->res), result)
                        : finish_receive(op, result);
}

/* In AnyIO, the end of the stream is an error. */
static PySendResult finish_anyio_receive(Op *op, PyObject **result)
{
    return op->res == 0 ? op_failed(op, result) : finish_receive(op, result);
}

/* ---- Sending --------------------------------------------------------------------------- */

/* Get the memory of the data. Returns 0 if it is not bytes, a bytearray or a memoryview of bytes,
 * or cannot be sent in one call. */
static int take_view(Op *op)
{
    PyObject *data = op->argument;
    if (PyMemoryView_Check(data)) {
        Py_buffer *shown = PyMemoryView_GET_BUFFER(data);
        if (shown->itemsize != 1 || shown->ndim != 1)
            return 0;
    } else if (!PyBytes_CheckExact(data) && !PyByteArray_CheckExact(data)) {
        return 0;
    }
    if (PyObject_GetBuffer(data, &op->view, PyBUF_SIMPLE) < 0) {
        PyErr_Clear();
        op->view.obj = NULL;
        return 0;
    }
    if (0 < op->view.len && op->view.len <= IO_MAX)
        return 1;
    PyBuffer_Release(&op->view);
    return 0;
}

/* Send with send(2) instead of the ring, without waiting. */
static void send_now(Op *op, Loop *loop, int fd)
{
    Py_ssize_t sent;
    Py_BEGIN_ALLOW_THREADS
    sent = send(fd, op->view.buf, (size_t)op->view.len, MSG_DONTWAIT | MSG_NOSIGNAL);
    op->res = sent < 0 ? -errno : (int32_t)sent;
    Py_END_ALLOW_THREADS
    op->loop = (Loop *)Py_NewRef((PyObject *)loop);
    op->state = COMPLETE;
    loop->sent_now++;
}

/* Returns 1 if op is in flight or complete; 0 if it must be delegated; -1 with an exception. */
static int push_send(Op *op, Loop *loop, PyObject *socket)
{
    PyObject *fd = fd_of(socket);
    if (fd == NULL)
        return 0;
    int pushed = take_view(op);
    if (pushed && loop_is_quiet(loop)) {
        send_now(op, loop, (int)PyLong_AsLong(fd));
    } else if (pushed) {
        struct sqe_fields sqe = {
            .fd = (int32_t)PyLong_AsLong(fd),
            .addr = op->view.buf,
            .len = (uint32_t)op->view.len,
            .op_flags = MSG_DONTWAIT | MSG_NOSIGNAL,
        };
        pushed = loop_push(loop, op, &sqe, fd);
        if (pushed <= 0)
            PyBuffer_Release(&op->view);
    }
    Py_DECREF(fd);
    return pushed;
}

static PySendResult start_send(Op *op, PyObject **result)
{
    Loop *loop = plain_loop();
    int pushed = loop != NULL ? push_send(op, loop, op->owner) : 0;
    if (pushed < 0)
        return op_end(op, NULL, result);
    return pushed ? wait_or_finish(op, result) : op_twin(op, result);
}

/* Push a send of all the data, with the stream's guard held. */
static PySendResult start_send_on(Op *op, Loop *loop, PyObject *socket, PyObject **result)
{
    int pushed = hold_guard(op) ? push_send(op, loop, socket) : 0;
    if (pushed == 1)
        return wait_or_finish(op, result);
    if (pushed == 0)
        return let_go_and_twin(op, result);
    op_let_go(op);
    return op_end(op, NULL, result);
}

static PySendResult start_send_all(Op *op, PyObject **result)
{
    Loop *loop = plain_loop();
    PyObject *socket = loop != NULL ? socket_of(op) : NULL;
    PySendResult sent;
    if (socket != NULL && attribute_is(socket, trio.did_shutdown, Py_False))
        sent = start_send_on(op, loop, socket, result);
    else
        sent = op_twin(op, result);
    Py_XDECREF(socket);
    return sent;
}

/* AnyIO does not ask whether the end of the stream has been sent; the kernel answers EPIPE. */
static PySendResult start_anyio_send(Op *op, PyObject **result)
{
    Loop *loop = plain_loop();
    PyObject *socket = loop != NULL ? socket_of(op) : NULL;
    PySendResult sent = socket != NULL ? start_send_on(op, loop, socket, result)
                                       : op_twin(op, result);
    Py_XDECREF(socket);
    return sent;
}

/* Send the rest in Python, because the kernel took only a part, or nothing from a full socket. */
static PySendResult send_rest(Op *op, PyObject **result)
{
    int sent = op->res > 0 ? op->res : 0;
    PyObject *coroutine =
        PyObject_CallFunction(op->kind->rest, "OOi", op->owner, op->argument, sent);
    if (coroutine != NULL)
        op->guard_held = 0; /* the coroutine releases it */
    op_let_go(op);
    return op_delegate(op, coroutine, result);
}

static PySendResult finish_send(Op *op, PyObject **result)
{
    if (op->res >= 0)
        return op_end(op, PyLong_FromLong(op->res), result);
    if (op->res == -EAGAIN)
        return send_rest(op, result);
    return op_failed(op, result);
}

static PySendResult finish_send_all(Op *op, PyObject **result)
{
    if (op->res == op->view.len)
        return op_end(op, Py_NewRef(Py_None), result);
    if (op->res >= 0 || op->res == -EAGAIN)
        return send_rest(op, result);
    return op_failed(op, result);
}

/* ---- Calls of the standard library ----------------------------------------------------- */

/* The argument is a tuple: the function to wait with, a method of Python's socket, and its arguments.
 * The engine calls the method. If it would block, Python waits and calls it again. */

static PyObject *attempt(PyObject *socket, PyObject *argument)
{
    PyObject *stdlib = PyObject_GetAttr(socket, trio.stdlib_socket);
    if (stdlib == NULL)
        return NULL;
    PyObject *args = PyTuple_GetSlice(argument, 1, PyTuple_GET_SIZE(argument));
    PyObject *value = NULL;
    if (args != NULL) {
        /* The socket takes the place of the method, which the argument keeps. */
        PyObject *method = PyTuple_GET_ITEM(args, 0);
        PyTuple_SET_ITEM(args, 0, stdlib);
        stdlib = method;
        value = PyObject_Call(method, args, NULL);
        Py_DECREF(args);
    }
    Py_DECREF(stdlib);
    return value;
}

/* Return the method's result, or raise its exception. */
static PySendResult finish_attempt(Op *op, PyObject **result)
{
    PyObject *received = op->received;
    op->received = NULL;
    if (op->res == 0)
        return op_end(op, received, result);
    PyErr_SetRaisedException(received);
    return op_end(op, NULL, result);
}

static PySendResult start_attempt(Op *op, PyObject **result)
{
    Loop *loop = plain_loop();
    if (loop == NULL || !PyTuple_CheckExact(op->argument) || PyTuple_GET_SIZE(op->argument) < 2)
        return op_twin(op, result);
    PyObject *value = attempt(op->owner, op->argument);
    if (value == NULL && PyErr_ExceptionMatches(PyExc_BlockingIOError)) {
        PyErr_Clear();
        return op_delegate(
            op, PyObject_CallFunctionObjArgs(op->kind->rest, op->owner, op->argument, NULL),
            result);
    }
    op->res = value == NULL ? -1 : 0;
    op->received = value != NULL ? value : PyErr_GetRaisedException();
    op->loop = (Loop *)Py_NewRef((PyObject *)loop);
    op->state = COMPLETE;
    return wait_or_finish(op, result);
}

/* ---- The kinds ------------------------------------------------------------------------- */

struct kind socket_recv = {
    .name = "recv", .opcode = OP_RECV, .reads = 1, .start = start_recv, .finish = finish_receive};
struct kind socket_recv_into = {.name = "recv_into",
                                .opcode = OP_RECV,
                                .reads = 1,
                                .start = start_recv_into,
                                .finish = finish_recv_into};
struct kind socket_send = {
    .name = "send", .opcode = OP_SEND, .start = start_send, .finish = finish_send};
struct kind stream_receive_some = {.name = "receive_some",
                                   .opcode = OP_RECV,
                                   .reads = 1,
                                   .start = start_receive_some,
                                   .finish = finish_receive};
struct kind stream_send_all = {
    .name = "send_all", .opcode = OP_SEND, .start = start_send_all, .finish = finish_send_all};
struct kind socket_attempt = {
    .name = "attempt", .start = start_attempt, .finish = finish_attempt};
struct kind anyio_receive = {.name = "anyio_receive",
                             .opcode = OP_RECV,
                             .reads = 1,
                             .start = start_anyio_receive,
                             .finish = finish_anyio_receive};
struct kind anyio_send = {
    .name = "anyio_send", .opcode = OP_SEND, .start = start_anyio_send, .finish = finish_send_all};
