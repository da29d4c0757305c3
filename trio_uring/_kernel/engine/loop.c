/*
 * Loop: the engine's state of one run. It fetches all completions, returns those of Python's
 * operations, and keeps its own until Trio's loop calls process_events.
 */
#include "engine.h"

#define REAP_MAX 1024 /* as in _ring.py: the most CQEs that one call fetches */
#define NATIVE_DONE 4 /* as in _in_flight.py: the engine has fetched completions of its own */

/* ---- Slots ----------------------------------------------------------------------------- */

static int grow_slots(Loop *loop)
{
    uint32_t count = loop->slot_count ? 2 * loop->slot_count : 64;
    struct slot *slots = PyMem_Realloc(loop->slots, count * sizeof *slots);
    if (slots == NULL)
        return -1;
    for (uint32_t i = loop->slot_count; i < count; i++)
        slots[i] = (struct slot){.next_free = i + 1};
    loop->first_free = loop->slot_count;
    loop->slots = slots;
    loop->slot_count = count;
    return 0;
}

static struct slot *slot_of(Loop *loop, uint64_t user_data)
{
    uint32_t index = (uint32_t)user_data;
    uint32_t generation = (uint32_t)(user_data >> 32) & (GENERATIONS - 1);
    if (index >= loop->slot_count || loop->slots[index].op == NULL ||
        loop->slots[index].generation != generation)
        return NULL;
    return &loop->slots[index];
}

/* ---- Fd waiters ------------------------------------------------------------------------ */

/* Register op for fd, as FdWaiters.register does: in a list. Returns 1; 0 if anything else waits on
 * the fd; -1 with an exception. */
int loop_enter_waiter(Loop *loop, Op *op, PyObject *fd)
{
    PyObject *entries = PyList_New(1); /* may run finalizers, so it comes first */
    if (entries == NULL)
        return -1;
    if (PyDict_GetItemWithError(loop->waiters, fd) != NULL ||
        PyDict_GetItemWithError(loop->registered, fd) != NULL || PyErr_Occurred()) {
        Py_DECREF(entries);
        return PyErr_Occurred() ? -1 : 0;
    }
    PyList_SET_ITEM(entries, 0, Py_NewRef((PyObject *)op));
    int stored = PyDict_SetItem(loop->waiters, fd, entries);
    Py_DECREF(entries);
    if (stored < 0)
        return -1;
    op->fd = Py_NewRef(fd);
    return 1;
}

/* Unregister op. After a close the list may be gone. It may also have more entries by now. */
int loop_leave_waiters(Loop *loop, Op *op)
{
    PyObject *fd = op->fd;
    int left = 0;
    if (fd == NULL)
        return 0;
    op->fd = NULL;
    PyObject *entries = PyDict_GetItemWithError(loop->waiters, fd);
    if (entries != NULL && PyList_CheckExact(entries))
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entries); i++)
            if (PyList_GET_ITEM(entries, i) == (PyObject *)op) {
                left = PyList_GET_SIZE(entries) == 1 ? PyDict_DelItem(loop->waiters, fd)
                                                     : PyList_SetSlice(entries, i, i + 1, NULL);
                break;
            }
    Py_DECREF(fd);
    return left < 0 || PyErr_Occurred() ? -1 : 0;
}

/* ---- Pushing --------------------------------------------------------------------------- */

/* Reserve a slot, whose user_data op gets: a finalizer may push another operation before this one is
 * pushed. Returns 0 if there is no memory. */
int loop_reserve_slot(Loop *loop, Op *op)
{
    if (loop->first_free == loop->slot_count && grow_slots(loop) < 0)
        return 0;
    struct slot *slot = &loop->slots[loop->first_free];
    op->user_data = NATIVE | (uint64_t)slot->generation << 32 | loop->first_free;
    loop->first_free = slot->next_free;
    return 1;
}

/* op was not pushed: free the slot that is reserved for it. */
void loop_free_slot(Loop *loop, Op *op)
{
    uint32_t index = (uint32_t)op->user_data;
    loop->slots[index].next_free = loop->first_free;
    loop->first_free = index;
}

/* op was pushed for the current task: put it into the slot that is reserved for it. */
void loop_fill_slot(Loop *loop, Op *op)
{
    loop->slots[(uint32_t)op->user_data].op = (Op *)Py_NewRef((PyObject *)op);
    loop->in_flight++;
    op->loop = (Loop *)Py_NewRef((PyObject *)loop);
    op->task = Py_NewRef(loop->task);
    op->state = IN_FLIGHT;
    if (loop->times_operations)
        op->since = nanoseconds();
}

/* Push op as sqe for the current task. Returns 1; 0 if op must be delegated; -1 with an
 * exception. */
int loop_push(Loop *loop, Op *op, struct sqe_fields *sqe, PyObject *fd)
{
    int entered = op->cancellable ? loop_enter_waiter(loop, op, fd) : 1;
    if (entered <= 0)
        return entered;
    if (!loop_reserve_slot(loop, op))
        return loop_leave_waiters(loop, op);
    sqe->opcode = op->opcode;
    if (api->push_many(loop->ring, sqe, 0, 1, op->user_data) != 1) {
        loop_free_slot(loop, op);
        return loop_leave_waiters(loop, op); /* full, forked or closed: Python handles that */
    }
    loop_fill_slot(loop, op);
    return 1;
}

/* ---- Completions ----------------------------------------------------------------------- */

/* Copy the received data and give the buffer back, before the kernel can need it again. */
static void take_buffer(Loop *loop, Op *op)
{
    if (!(op->flags & IORING_CQE_F_BUFFER)) {
        if (op->res == 0 && op->view.obj == NULL)
            op->received = PyBytes_FromStringAndSize(NULL, 0); /* the end of a stream */
        return;
    }
    unsigned id = op->flags >> IORING_CQE_BUFFER_SHIFT;
    uint32_t consumed = loop->consumed != NULL ? loop->consumed[id] : 0;
    if (op->res >= 0 && op->task != NULL) {
        char *data = loop->memory + (size_t)id * (size_t)loop->buffer_size + consumed;
        if (op->view.obj != NULL)
            memcpy(op->view.buf, data, (size_t)op->res); /* no more than was asked for */
        else
            op->received = PyBytes_FromStringAndSize(data, op->res);
    }
    op->flags &= ~IORING_CQE_F_BUFFER; /* so that Python does not give it back, too */
    if (loop->consumed != NULL && op->flags & IORING_CQE_F_BUF_MORE) {
        loop->consumed[id] = consumed + (uint32_t)(op->res > 0 ? op->res : 0);
        return;
    }
    if (loop->consumed != NULL)
        loop->consumed[id] = 0;
    api->buffer_ring_add(loop->pool, id);
}

/* Complete the operation in slot. If wake is false, its task will not get the result. Returns the
 * task, or None; NULL with an exception. */
static PyObject *complete(Loop *loop, struct slot *slot, struct io_uring_cqe *cqe, int wake)
{
    Op *op = slot->op;
    if (op->kind->described && cqe->flags & IORING_CQE_F_MORE) {
        op->res = cqe->res; /* of a zero-copy send; the kernel still uses the buffer */
        return Py_NewRef(Py_None);
    }
    slot->op = NULL; /* this takes over the kernel's reference */
    slot->generation = (slot->generation + 1) & (GENERATIONS - 1);
    slot->next_free = loop->first_free;
    loop->first_free = (uint32_t)(slot - loop->slots);
    loop->in_flight--;

    if (op->kind->described && cqe->flags & IORING_CQE_F_NOTIF) {
        op->flags = (uint32_t)cqe->res; /* as in InFlightTable.dispatch */
    } else {
        op->res = cqe->res;
        op->flags = cqe->flags;
    }
    op->state = COMPLETE;
    loop->completed[op->opcode] += 1;
    if (op->kind->reads)
        take_buffer(loop, op);
    PyErr_Clear(); /* no memory for the received data: finish_receive raises MemoryError */
    PyObject *task = op->task != NULL ? op->task : Py_NewRef(Py_None);
    op->task = NULL;
    if (task == Py_None || !wake) {
        op_discard(op);
        op->state = ENDED;
        op_let_go(op);
    }
    if (op_release_token(op) < 0 || loop_leave_waiters(loop, op) < 0)
        Py_CLEAR(task);
    Py_DECREF(op);
    return task;
}

/* Process all completions fetched since the last call. If wake is true, reschedule their tasks. */
static int finish_completions(Loop *loop, int wake)
{
    while (loop->cqe_next < loop->cqe_count) {
        struct io_uring_cqe cqe = loop->cqes[loop->cqe_next++];
        struct slot *slot = slot_of(loop, cqe.user_data);
        if (slot == NULL)
            continue;
        PyObject *task = complete(loop, slot, &cqe, wake);
        int woken = task == NULL ? -1 : 0;
        if (woken == 0 && wake && task != Py_None)
            woken = reschedule(loop, task, Py_None);
        Py_XDECREF(task);
        if (woken < 0)
            return -1;
    }
    loop->cqe_next = loop->cqe_count = 0;
    return 0;
}

static PyObject *loop_dispatch(Loop *loop, PyObject *unused)
{
    if (finish_completions(loop, 1) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *loop_discard(Loop *loop, PyObject *unused)
{
    if (finish_completions(loop, 0) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* has_fetched(user_data): whether its completion was fetched and not dispatched yet. */
static PyObject *loop_has_fetched(Loop *loop, PyObject *number)
{
    unsigned long long user_data = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    int found = 0;
    for (uint32_t i = loop->cqe_next; i < loop->cqe_count; i++)
        found |= loop->cqes[i].user_data == user_data;
    return PyBool_FromLong(found);
}

static int make_room(Loop *loop)
{
    if (loop->cqe_room - loop->cqe_count >= REAP_MAX)
        return 0;
    uint32_t room = loop->cqe_count + 2 * REAP_MAX;
    struct io_uring_cqe *cqes = PyMem_Realloc(loop->cqes, room * sizeof *cqes);
    if (cqes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    loop->cqes = cqes;
    loop->cqe_room = room;
    return 0;
}

static int append_completion(PyObject *list, uint64_t user_data, int32_t res, uint32_t flags)
{
    PyObject *completion =
        Py_BuildValue("KiI", (unsigned long long)user_data, (int)res, (unsigned)flags);
    int appended = completion != NULL ? PyList_Append(list, completion) : -1;
    Py_XDECREF(completion);
    return appended;
}

/* Submit and wait, as Ring.submit_and_wait. Returns Python's completions as a list of (user_data,
 * res, flags), or a negated errno. The list ends with NATIVE_DONE if the engine's completions were
 * fetched too. */
static PyObject *loop_submit_and_wait(Loop *loop, PyObject *seconds)
{
    double timeout = PyFloat_AsDouble(seconds);
    if ((timeout == -1 && PyErr_Occurred()) || make_room(loop) < 0)
        return NULL;
    /* Making Python objects can run finalizers, which may call this function again. So all is copied
     * to its place before. */
    struct io_uring_cqe fetched[REAP_MAX];
    uint32_t others = 0;
    loop->budget_end = 0;
    int count;
    Py_BEGIN_ALLOW_THREADS
    count = api->submit_and_wait(loop->ring, timeout, fetched, REAP_MAX);
    Py_END_ALLOW_THREADS
    if (count < 0)
        return PyLong_FromLong(count);
    for (int i = 0; i < count; i++)
        if (fetched[i].user_data & NATIVE)
            loop->cqes[loop->cqe_count++] = fetched[i];
        else
            fetched[others++] = fetched[i];
    PyObject *foreign = PyList_New(0);
    for (uint32_t i = 0; foreign != NULL && i < others; i++)
        if (append_completion(foreign, fetched[i].user_data, fetched[i].res, fetched[i].flags) < 0)
            Py_CLEAR(foreign);
    int has_native = (uint32_t)count > others;
    if (foreign != NULL && has_native && append_completion(foreign, NATIVE_DONE, 0, 0) < 0)
        Py_CLEAR(foreign);
    return foreign;
}

/* ---- For Python ------------------------------------------------------------------------ */

static PyObject *loop_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ring", "python_ring", "manager",        "waiters", "registered",
                            "limiter", "send_operation", NULL};
    unsigned long long ring;
    PyObject *python_ring, *manager, *waiters, *registered, *limiter, *send_operation;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KOOO!O!OO", names, &ring, &python_ring, &manager,
                                     &PyDict_Type, &waiters, &PyDict_Type, &registered, &limiter,
                                     &send_operation))
        return NULL;
    Loop *loop = (Loop *)type->tp_alloc(type, 0);
    if (loop == NULL)
        return NULL;
    loop->ring = (struct ring *)(uintptr_t)ring;
    loop->python_ring = Py_NewRef(python_ring);
    loop->manager = Py_NewRef(manager);
    loop->limiter = Py_NewRef(limiter);
    loop->waiters = Py_NewRef(waiters);
    loop->registered = Py_NewRef(registered);
    loop->send_operation = Py_NewRef(send_operation);
    return (PyObject *)loop;
}

/* begin(runner, turn_budget, may_send_now): called in the run's first loop iteration. */
static PyObject *loop_begin(Loop *loop, PyObject *args)
{
    PyObject *runner;
    double turn_budget;
    if (!PyArg_ParseTuple(args, "Odp", &runner, &turn_budget, &loop->may_send_now))
        return NULL;
    loop->budget = (int64_t)(turn_budget * 1e9);
    if (Py_TYPE(runner) != trio.runner_type)
        return PyErr_Format(PyExc_TypeError, "not a runner: %R", runner);
    PyObject *hooks = PyObject_GetAttrString(SLOT(runner, trio.instruments), "data");
    PyObject *wake = PyObject_GetAttrString(SLOT(runner, trio.runq), "append");
    if (hooks != NULL && wake != NULL && !PyDict_CheckExact(hooks))
        PyErr_SetString(PyExc_TypeError, "a runner's instruments are in no dict");
    if (PyErr_Occurred()) {
        Py_XDECREF(hooks);
        Py_XDECREF(wake);
        return NULL;
    }
    Py_XSETREF(loop->hooks, hooks);
    Py_XSETREF(loop->wake, wake);
    Py_XSETREF(loop->runner, Py_NewRef(runner));
    Py_XSETREF(loop->queue, Py_NewRef(SLOT(runner, trio.runq)));
    Py_RETURN_NONE;
}

/* receive_into(pool, memory, address, size, incremental_count, group, operation): sets the provided
 * buffers. incremental_count is their number if they are incremental, otherwise 0. */
static PyObject *loop_receive_into(Loop *loop, PyObject *args)
{
    unsigned long long pool, address;
    PyObject *memory, *operation;
    Py_ssize_t size, count;
    unsigned group;
    if (!PyArg_ParseTuple(args, "KOKnnIO", &pool, &memory, &address, &size, &count, &group,
                          &operation))
        return NULL;
    if (count > 0) {
        uint32_t *consumed = PyMem_Calloc((size_t)count, sizeof *consumed);
        if (consumed == NULL)
            return PyErr_NoMemory();
        PyMem_Free(loop->consumed);
        loop->consumed = consumed;
    }
    loop->pool = (struct buffer_ring *)(uintptr_t)pool;
    loop->memory = (char *)(uintptr_t)address;
    loop->buffer_size = size;
    loop->group = group;
    Py_XSETREF(loop->memory_owner, Py_NewRef(memory));
    Py_XSETREF(loop->receive_operation, Py_NewRef(operation));
    Py_RETURN_NONE;
}

/* Returns the numbers of completions by opcode. */
static PyObject *list_of_counts(const unsigned long long counts[256])
{
    PyObject *list = PyList_New(256);
    for (int i = 0; list != NULL && i < 256; i++) {
        PyObject *count = PyLong_FromUnsignedLongLong(counts[i]);
        if (count == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, count);
    }
    return list;
}

static PyObject *loop_completed(Loop *loop, PyObject *unused)
{
    return list_of_counts(loop->completed);
}

static PyObject *loop_in_flight_by_opcode(Loop *loop, PyObject *unused)
{
    unsigned long long counts[256] = {0};
    for (uint32_t i = 0; i < loop->slot_count; i++)
        if (loop->slots[i].op != NULL)
            counts[loop->slots[i].op->opcode] += 1;
    return list_of_counts(counts);
}

static PyObject *loop_within_budget(Loop *loop, PyObject *unused)
{
    return PyBool_FromLong(within_budget(loop));
}

static PyObject *loop_cancel_all(Loop *loop, PyObject *unused)
{
    for (uint32_t i = 0; i < loop->slot_count; i++)
        if (loop->slots[i].op != NULL && op_ask_cancel(loop->slots[i].op) < 0)
            return NULL;
    Py_RETURN_NONE;
}

/* fail_all(res): make up a completion for each operation in flight, because the kernel will report
 * none. It may still access their memory, which is never released. */
static PyObject *loop_fail_all(Loop *loop, PyObject *number)
{
    long res = PyLong_AsLong(number);
    if (res == -1 && PyErr_Occurred())
        return NULL;
    uint32_t room = loop->cqe_count + loop->in_flight + REAP_MAX;
    struct io_uring_cqe *cqes = PyMem_Realloc(loop->cqes, room * sizeof *cqes);
    if (cqes == NULL)
        return PyErr_NoMemory();
    loop->cqes = cqes;
    loop->cqe_room = room;
    for (uint32_t i = 0; i < loop->slot_count; i++) {
        Op *op = loop->slots[i].op;
        if (op == NULL)
            continue;
        op->view.obj = NULL;
        if (op->pinned) {
            op->pinned = 0;
            Py_INCREF(op->argument); /* which has the pins */
        }
        cqes[loop->cqe_count++] =
            (struct io_uring_cqe){.user_data = op->user_data, .res = (int32_t)res};
    }
    Py_RETURN_NONE;
}

/* The run ends: release it. The kernel may still write to the memory of operations in flight, so
 * their references are never released. */
static int loop_clear(Loop *loop)
{
    Py_CLEAR(loop->runner);
    Py_CLEAR(loop->hooks);
    Py_CLEAR(loop->wake);
    Py_CLEAR(loop->queue);
    Py_CLEAR(loop->context);
    Py_CLEAR(loop->manager);
    Py_CLEAR(loop->python_ring);
    if (loop->in_flight == 0) {
        loop->pool = NULL;
        Py_CLEAR(loop->memory_owner);
    }
    return 0;
}

static PyObject *loop_close(Loop *loop, PyObject *unused)
{
    loop_clear(loop);
    Py_RETURN_NONE;
}

static int loop_traverse(Loop *loop, visitproc visit, void *arg)
{
    Py_VISIT(loop->runner);
    Py_VISIT(loop->hooks);
    Py_VISIT(loop->wake);
    Py_VISIT(loop->queue);
    Py_VISIT(loop->context);
    Py_VISIT(loop->manager);
    Py_VISIT(loop->python_ring);
    Py_VISIT(loop->limiter);
    Py_VISIT(loop->waiters);
    Py_VISIT(loop->registered);
    Py_VISIT(loop->receive_operation);
    for (uint32_t i = 0; i < loop->slot_count; i++)
        Py_VISIT(loop->slots[i].op);
    return 0;
}

static void loop_dealloc(Loop *loop)
{
    PyObject_GC_UnTrack(loop);
    loop_clear(loop);
    Py_CLEAR(loop->limiter);
    Py_CLEAR(loop->waiters);
    Py_CLEAR(loop->registered);
    Py_CLEAR(loop->receive_operation);
    Py_CLEAR(loop->send_operation);
    PyMem_Free(loop->slots);
    PyMem_Free(loop->cqes);
    PyMem_Free(loop->consumed);
    Py_TYPE(loop)->tp_free(loop);
}

static PyMethodDef loop_methods[] = {
    {"begin", (PyCFunction)loop_begin, METH_VARARGS, NULL},
    {"receive_into", (PyCFunction)loop_receive_into, METH_VARARGS, NULL},
    {"submit_and_wait", (PyCFunction)loop_submit_and_wait, METH_O, NULL},
    {"dispatch", (PyCFunction)loop_dispatch, METH_NOARGS, NULL},
    {"discard", (PyCFunction)loop_discard, METH_NOARGS, NULL},
    {"has_fetched", (PyCFunction)loop_has_fetched, METH_O, NULL},
    {"within_budget", (PyCFunction)loop_within_budget, METH_NOARGS, NULL},
    {"completed", (PyCFunction)loop_completed, METH_NOARGS, NULL},
    {"in_flight_by_opcode", (PyCFunction)loop_in_flight_by_opcode, METH_NOARGS, NULL},
    {"cancel_all", (PyCFunction)loop_cancel_all, METH_NOARGS, NULL},
    {"fail_all", (PyCFunction)loop_fail_all, METH_O, NULL},
    {"close", (PyCFunction)loop_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef loop_members[] = {
    {"in_flight", T_UINT, offsetof(Loop, in_flight), READONLY, NULL},
    {"send_operation", T_OBJECT, offsetof(Loop, send_operation), READONLY, NULL},
    {"receive_operation", T_OBJECT, offsetof(Loop, receive_operation), READONLY, NULL},
    {"sent_now", T_ULONGLONG, offsetof(Loop, sent_now), READONLY, NULL},
    {"has_files", T_BOOL, offsetof(Loop, has_files), 0, NULL},
    {"times_operations", T_BOOL, offsetof(Loop, times_operations), 0, NULL},
    {"file_hits", T_ULONGLONG, offsetof(Loop, file_hits), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject LoopType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "trio_uring._kernel._native.Loop",
    .tp_basicsize = sizeof(Loop),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = loop_new,
    .tp_dealloc = (destructor)loop_dealloc,
    .tp_traverse = (traverseproc)loop_traverse,
    .tp_clear = (inquiry)loop_clear,
    .tp_methods = loop_methods,
    .tp_members = loop_members,
};
