/*
 * Runs steps of tasks in place of Trio's loop: the common case of its inner `while batch:`.
 *
 * Trio's loop calls step(runner, batch) before that inner loop (_trio_step.py inserts the call). It
 * takes tasks off the batch as long as is_plain(task), and leaves the rest to Trio's inner loop. So
 * it may stop at any point, in a state that Trio's loop expects.
 */
#include "engine.h"

#include <time.h>

/* The loop whose step this thread runs. Operations find their ring here. It is NULL while Trio's
 * loop runs tasks, so their operations are delegated. */
static _Thread_local Loop *stepping;

static PyObject *task_name; /* "task", the current task's key in Trio's context of a thread */
static PyObject *native_name, *dict_name;
static PyMethodDef *coroutine_send;

/* The loop that runs the current task, or NULL. stepping is not enough: a task may run another
 * event loop, or switch to a greenlet of another task. So Trio's current task is compared, too. */
Loop *current_loop(void)
{
    Loop *loop = stepping;
    if (loop == NULL || PyDict_GetItemWithError(loop->context, task_name) != loop->task)
        return NULL;
    return loop;
}

static int status_says_cancelled(PyObject *task)
{
    PyObject *status = SLOT(task, trio.cancel_status);
    return status != NULL && Py_TYPE(status) == trio.status_type &&
           SLOT(status, trio.effectively_cancelled) == Py_True;
}

/* Whether the current task may be cancelled at its next checkpoint. Then Python checks exactly. */
int is_cancelled(Loop *loop)
{
    return status_says_cancelled(loop->task) || SLOT(loop->runner, trio.ki_pending) == Py_True;
}

/* Whether a system call that need not wait is cheaper than the ring. It is if the current task is
 * the only one of this loop iteration: an operation on the ring would need an enter of its own, and
 * its completion would be dispatched in the next iteration. With one or two connections, the system
 * call took 0.8 times the CPU time and gave 1.15 times the rate. With four connections it is
 * slower: each peer is woken by itself, so completions come one by one. */
#define QUIET_MAX 1 /* operations in flight besides this one */
int loop_is_quiet(Loop *loop)
{
    return loop->may_send_now && loop->in_flight <= QUIET_MAX &&
           PyList_GET_SIZE(loop->batch) == 0 && PyObject_Size(loop->queue) == 0 &&
           api->is_idle(loop->ring);
}

/* ---- Rescheduling ---------------------------------------------------------------------- */

/* Sent to a task after a shielded checkpoint, instead of outcome.Value(None). */
static PyObject *nothing_unwrap(PyObject *self, PyObject *unused) { Py_RETURN_NONE; }

static PyMethodDef nothing_methods[] = {
    {"unwrap", nothing_unwrap, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject NothingType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "trio_uring._kernel._native.Nothing",
    .tp_basicsize = sizeof(PyObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = nothing_methods,
};
static PyObject *nothing;

static inline void set_slot(PyObject *object, Py_ssize_t offset, PyObject *value)
{
    PyObject *old = SLOT(object, offset);
    SLOT(object, offset) = value;
    Py_XDECREF(old);
}

static int add_one(PyObject *task, Py_ssize_t offset)
{
    static PyObject *one;
    if (one == NULL)
        one = PyLong_FromLong(1);
    PyObject *sum = one != NULL ? PyNumber_Add(SLOT(task, offset), one) : NULL;
    if (sum == NULL)
        return -1;
    set_slot(task, offset, sum);
    return 0;
}

int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Whether this loop iteration is within its turn budget, which the first call starts. */
int within_budget(Loop *loop)
{
    if (loop->budget == 0)
        return 0;
    int64_t now = nanoseconds();
    if (loop->budget_end == 0)
        loop->budget_end = now + loop->budget;
    return now < loop->budget_end;
}

/* As TurnBudget.skip_schedule_point, for a task that need not wait. Counts a cancel point. Returns
 * 1 if the task may continue without a schedule point, which is counted too; 0 if it must execute
 * one; -1 with an exception. */
int pass_cancel_point(Loop *loop)
{
    if (add_one(loop->task, trio.cancel_points) < 0)
        return -1;
    if (PyDict_GET_SIZE(loop->hooks) > 1 || !within_budget(loop))
        return 0;
    return add_one(loop->task, trio.schedule_points) < 0 ? -1 : 1;
}

/* As Runner.reschedule, which is called if there are instruments or the task is unusual. */
int reschedule(Loop *loop, PyObject *task, PyObject *value)
{
    PyObject *coro = SLOT(task, trio.coro);
    if (PyDict_GET_SIZE(loop->hooks) > 1 || SLOT(task, trio.next_send_fn) != Py_None ||
        !PyCoro_CheckExact(coro)) {
        PyObject *done =
            PyObject_CallMethod(loop->runner, "reschedule", "OO", task, value);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    PyObject *send = PyCFunction_NewEx(coroutine_send, coro, NULL); /* the same as coro.send */
    if (send == NULL)
        return -1;
    set_slot(task, trio.next_send_fn, send);
    set_slot(task, trio.next_send, Py_NewRef(value));
    set_slot(task, trio.abort_func, Py_NewRef(Py_None));
    set_slot(task, trio.custom_sleep_data, Py_NewRef(Py_None));
    PyObject *appended = PyObject_CallOneArg(loop->wake, task);
    Py_XDECREF(appended);
    return appended == NULL ? -1 : 0;
}

/* ---- A step ---------------------------------------------------------------------------- */

static int is_plain(PyObject *task)
{
    return Py_TYPE(task) == trio.task_type && SLOT(task, trio.next_send_fn) != Py_None &&
           PyContext_CheckExact(SLOT(task, trio.task_context));
}

/* Run the task until it yields a message, returns or raises. */
static PySendResult resume(PyObject *task, PyObject **message)
{
    /* The task may replace these during the step, as trio.from_thread does. */
    PyObject *coro = Py_NewRef(SLOT(task, trio.coro));
    PyObject *context = Py_NewRef(SLOT(task, trio.task_context));
    PyObject *function = SLOT(task, trio.next_send_fn), *value = SLOT(task, trio.next_send);
    SLOT(task, trio.next_send_fn) = Py_NewRef(Py_None);
    SLOT(task, trio.next_send) = Py_NewRef(Py_None);

    PySendResult sent = PYGEN_ERROR;
    *message = NULL;
    if (PyContext_Enter(context) == 0) {
        if (PyCFunction_CheckExact(function) && PyCFunction_GET_SELF(function) == coro &&
            ((PyCFunctionObject *)function)->m_ml == coroutine_send) {
            sent = PyIter_Send(coro, value, message);
        } else { /* coro.throw, or another kind of coroutine */
            *message = PyObject_CallOneArg(function, value);
            if (*message != NULL)
                sent = PYGEN_NEXT;
            else if (PyErr_ExceptionMatches(PyExc_StopIteration)) {
                PyObject *stop = PyErr_GetRaisedException();
                *message = PyObject_GetAttrString(stop, "value");
                Py_DECREF(stop);
                sent = *message != NULL ? PYGEN_RETURN : PYGEN_ERROR;
            }
        }
        if (PyContext_Exit(context) < 0) { /* the task fails, as with Context.run */
            Py_CLEAR(*message);
            sent = PYGEN_ERROR;
        }
    }
    Py_DECREF(coro);
    Py_DECREF(context);
    Py_DECREF(function);
    Py_XDECREF(value);
    return sent;
}

static int exited(PyObject *runner, PyObject *task, PyObject *message)
{
    PyObject *outcome;
    if (message != NULL) {
        outcome = PyObject_CallOneArg(trio.value, message);
    } else {
        PyObject *error = PyErr_GetRaisedException();
        outcome = PyObject_CallOneArg(trio.error, error);
        Py_DECREF(error);
    }
    PyObject *done =
        outcome ? PyObject_CallMethod(runner, "task_exited", "OO", task, outcome) : NULL;
    Py_XDECREF(outcome);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* The task waits. The reference to abort_func is stolen. */
static int sleeps(PyObject *runner, PyObject *task, PyObject *abort_func)
{
    if (abort_func == NULL || add_one(task, trio.schedule_points) < 0 ||
        add_one(task, trio.cancel_points) < 0) {
        Py_XDECREF(abort_func);
        return -1;
    }
    set_slot(task, trio.abort_func, abort_func);
    PyObject *delivered = NULL;
    if (SLOT(runner, trio.ki_pending) == Py_True && SLOT(runner, trio.main_task) == task) {
        delivered = PyObject_CallMethodNoArgs(task, trio.deliver_ki);
        if (delivered == NULL)
            return -1;
        Py_DECREF(delivered);
    }
    if (status_says_cancelled(task)) {
        delivered = PyObject_CallMethodNoArgs(task, trio.deliver_cancel);
        if (delivered == NULL)
            return -1;
        Py_DECREF(delivered);
    }
    return 0;
}

static PyObject *replay_message(PyObject *message, PyObject *unused) { return Py_NewRef(message); }
static PyMethodDef replay = {"replay", replay_message, METH_O, NULL};

/* Let Trio's loop process message: put the task back into the batch, so that its next step yields
 * message. */
static int leave_to_trio(PyObject *batch, PyObject *task, PyObject *message)
{
    PyObject *function = PyCFunction_NewEx(&replay, message, NULL);
    if (function == NULL)
        return -1;
    set_slot(task, trio.next_send_fn, function);
    return PyList_Append(batch, task) < 0 ? -1 : 1;
}

/* Run a step of task. Returns 1 if Trio's loop must continue with the batch. */
static int step_task(Loop *loop, PyObject *runner, PyObject *batch, PyObject *task)
{
    PyObject *message;
    PySendResult sent = resume(task, &message);
    int result;
    if (sent != PYGEN_NEXT) {
        result = exited(runner, task, message);
    } else if (Py_TYPE(message) == &OpType) {
        set_slot(task, trio.custom_sleep_data, Py_NewRef(message)); /* for debuggers */
        result = sleeps(runner, task, Py_NewRef(message));
    } else if (message == trio.checkpoint) {
        result = add_one(task, trio.schedule_points);
        if (result == 0)
            result = reschedule(loop, task, nothing);
    } else if (Py_TYPE(message) == trio.wait_type) {
        result = sleeps(runner, task, PyObject_GetAttrString(message, "abort_func"));
    } else {
        result = leave_to_trio(batch, task, message);
    }
    Py_XDECREF(message);
    return result;
}

/* The task has added an instrument. Trio calls it at the end of the same step. */
static int call_after_task_step(Loop *loop, PyObject *runner, PyObject *task)
{
    PyObject *hook = PyUnicode_FromString("after_task_step"), *called = NULL;
    int wanted = hook != NULL ? PyDict_Contains(loop->hooks, hook) : -1;
    if (wanted > 0)
        called = PyObject_CallMethod(SLOT(runner, trio.instruments), "call", "OO", hook, task);
    Py_XDECREF(hook);
    Py_XDECREF(called);
    return wanted < 0 || (wanted > 0 && called == NULL) ? -1 : 0;
}

static int step_batch(Loop *loop, PyObject *runner, PyObject *batch)
{
    int result = 0;
    while (result == 0 && PyList_GET_SIZE(batch) > 0 && PyDict_GET_SIZE(loop->hooks) <= 1) {
        Py_ssize_t last = PyList_GET_SIZE(batch) - 1;
        PyObject *task = Py_NewRef(PyList_GET_ITEM(batch, last));
        if (!is_plain(task)) {
            Py_DECREF(task);
            break;
        }
        loop->batch = batch;
        stepping = loop; /* a run inside of a task may have changed it */
        loop->task = task;
        result = PyDict_SetItem(loop->context, task_name, task);
        if (result == 0)
            result = PyList_SetSlice(batch, last, last + 1, NULL);
        if (result == 0)
            result = step_task(loop, runner, batch, task);
        if (result == 0 && PyDict_GET_SIZE(loop->hooks) > 1)
            result = call_after_task_step(loop, runner, task);
        Py_DECREF(task);
    }
    return result;
}

static Loop *loop_of(PyObject *runner)
{
    if (Py_TYPE(runner) != trio.runner_type)
        return NULL;
    PyObject *manager = SLOT(runner, trio.io_manager);
    if (manager == NULL || !PyObject_TypeCheck(manager, trio.manager_type))
        return NULL;
    PyObject *loop = PyObject_GetAttr(manager, native_name);
    if (loop == NULL) {
        PyErr_Clear();
        return NULL;
    }
    Py_DECREF(loop); /* the manager keeps it */
    if (Py_TYPE(loop) != &LoopType || ((Loop *)loop)->runner != runner)
        return NULL;
    return (Loop *)loop;
}

PyObject *make_steps(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "step() takes 2 arguments");
    PyObject *runner = args[0], *batch = args[1];
    Loop *outer = stepping, *loop = loop_of(runner);
    if (loop == NULL || loop->task != NULL || !PyList_CheckExact(batch)) {
        stepping = NULL; /* Trio's loop runs the tasks, perhaps inside of another loop's step */
        Py_RETURN_NONE;
    }
    PyObject *context = PyObject_GetAttr(trio.context, dict_name);
    if (context == NULL)
        return NULL;
    Py_INCREF(loop);
    Py_XSETREF(loop->context, context);
    int result = step_batch(loop, runner, batch);
    if (result >= 0 && loop->task != NULL)
        result = PyDict_DelItem(loop->context, task_name);
    loop->task = loop->batch = NULL;
    stepping = outer;
    Py_DECREF(loop);
    if (result < 0)
        return NULL;
    Py_RETURN_NONE;
}

int init_step(void)
{
    task_name = PyUnicode_InternFromString("task");
    native_name = PyUnicode_InternFromString("native");
    dict_name = PyUnicode_InternFromString("__dict__");
    PyObject *send = PyObject_GetAttrString((PyObject *)&PyCoro_Type, "send");
    if (task_name == NULL || native_name == NULL || dict_name == NULL || send == NULL)
        return -1;
    if (Py_TYPE(send) != &PyMethodDescr_Type) {
        PyErr_SetString(PyExc_ImportError, "coroutines have no send method");
        return -1;
    }
    coroutine_send = ((PyMethodDescrObject *)send)->d_method; /* valid as long as the type */
    Py_DECREF(send);
    if (PyType_Ready(&NothingType) < 0)
        return -1;
    nothing = PyType_GenericAlloc(&NothingType, 0);
    return nothing == NULL ? -1 : 0;
}
