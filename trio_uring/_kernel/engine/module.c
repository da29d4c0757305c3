/* The module trio_uring._kernel._native: setup by Python, and the functions that it imports. */
#include "engine.h"

struct trio trio;
const struct engine_api *api;

/* ---- Setup ------------------------------------------------------------------------------- */

/* Get a slot's offset from its member descriptor in the class. */
static int slot_offset(PyObject *trio_names, const char *name, PyTypeObject *type,
                       Py_ssize_t *offset)
{
    PyObject *slot = PyDict_GetItemString(trio_names, name);
    if (slot == NULL || Py_TYPE(slot) != &PyMemberDescr_Type ||
        ((PyMemberDescrObject *)slot)->d_member->type != T_OBJECT_EX ||
        PyDescr_TYPE(slot) != type) {
        PyErr_Format(PyExc_TypeError, "%s is no slot of %s", name, type->tp_name);
        return -1;
    }
    *offset = ((PyMemberDescrObject *)slot)->d_member->offset;
    return 0;
}

static PyObject *interned(PyObject *name)
{
    Py_INCREF(name);
    PyUnicode_InternInPlace(&name);
    return name;
}

static int object_named(PyObject *names, const char *name, PyTypeObject *type, void *object)
{
    PyObject *found = PyDict_GetItemString(names, name);
    if (found == NULL || (type != NULL && !PyObject_TypeCheck(found, type))) {
        PyErr_Format(PyExc_TypeError, "%s is missing, or of the wrong type", name);
        return -1;
    }
    /* A string is an attribute's name. */
    *(PyObject **)object = PyUnicode_CheckExact(found) ? interned(found) : Py_NewRef(found);
    return 0;
}

/* setup(api, names): called once per process. names has the members of struct trio. */
static PyObject *setup(PyObject *module, PyObject *args)
{
    unsigned long long address;
    PyObject *names;
    if (!PyArg_ParseTuple(args, "KO!", &address, &PyDict_Type, &names))
        return NULL;
    const struct engine_api *given = (const struct engine_api *)(uintptr_t)address;
    if (given->layout != ENGINE_API_LAYOUT)
        return PyErr_Format(PyExc_ImportError, "the ring's core has layout %u, and not %u",
                            (unsigned)given->layout, ENGINE_API_LAYOUT);
    struct trio t;
#define TYPE(name) object_named(names, #name, &PyType_Type, &t.name) < 0
#define OBJECT(name) object_named(names, #name, NULL, &t.name) < 0
#define NAME(name) object_named(names, #name, &PyUnicode_Type, &t.name) < 0
#define OFFSET(name, type) slot_offset(names, #name, t.type, &t.name) < 0
    if (TYPE(task_type) || TYPE(runner_type) || TYPE(status_type) || TYPE(wait_type) ||
        TYPE(manager_type) || TYPE(socket_type) || OBJECT(checkpoint) ||
        OBJECT(value) || OBJECT(error) || OBJECT(abort_failed) || OBJECT(context) ||
        NAME(deliver_cancel) || NAME(deliver_ki) || NAME(socket) || NAME(stdlib_socket) ||
        NAME(fileno) || NAME(is_stream) ||
        NAME(did_shutdown) || NAME(push) || NAME(release) || NAME(try_acquire) || TYPE(operation_type) ||
        OFFSET(next_send_fn, task_type) || OFFSET(next_send, task_type) ||
        OFFSET(abort_func, task_type) || OFFSET(custom_sleep_data, task_type) ||
        OFFSET(cancel_status, task_type) || OFFSET(coro, task_type) ||
        OFFSET(task_context, task_type) || OFFSET(schedule_points, task_type) ||
        OFFSET(cancel_points, task_type) || OFFSET(effectively_cancelled, status_type) ||
        OFFSET(ki_pending, runner_type) || OFFSET(main_task, runner_type) ||
        OFFSET(runq, runner_type) || OFFSET(instruments, runner_type) ||
        OFFSET(io_manager, runner_type) || OFFSET(sqe, operation_type) ||
        OFFSET(operation_fd, operation_type) || OFFSET(pins, operation_type) ||
        OFFSET(spent, operation_type) || OFFSET(cancellable, operation_type) ||
        OFFSET(limited, operation_type) || OFFSET(decode, operation_type) ||
        OFFSET(discard, operation_type) || OFFSET(on_cqe_more, operation_type) ||
        OFFSET(second_fd, operation_type) || OFFSET(acts_on_fd, operation_type) ||
        OFFSET(buffers, operation_type))
        return NULL;
    trio = t;
    api = given;
    Py_RETURN_NONE;
}

static struct kind *const kinds[] = {&perform,         &perform_shielded,    &socket_recv,
                                     &socket_recv_into, &socket_send,         &socket_attempt,
                                     &stream_receive_some, &stream_send_all, &anyio_receive,
                                     &anyio_send};

static struct kind *kind_named(const char *name)
{
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (strcmp(kinds[i]->name, name) == 0)
            return kinds[i];
    PyErr_Format(PyExc_ValueError, "there is no %s", name);
    return NULL;
}

/* set_twin(name, twin, rest, failed): sets the Python functions of a kind; see struct kind. */
static PyObject *set_twin(PyObject *module, PyObject *args)
{
    const char *name;
    PyObject *twin, *rest, *failed;
    if (!PyArg_ParseTuple(args, "sOOO", &name, &twin, &rest, &failed))
        return NULL;
    struct kind *kind = kind_named(name);
    if (kind == NULL)
        return NULL;
    Py_XSETREF(kind->twin, Py_NewRef(twin));
    Py_XSETREF(kind->rest, Py_NewRef(rest));
    Py_XSETREF(kind->failed, Py_NewRef(failed));
    Py_RETURN_NONE;
}

/* set_stream(name, function, socket, guard, held, guard_type): sets what a kind for streams uses of
 * them; see struct kind. */
static PyObject *set_stream(PyObject *module, PyObject *args)
{
    const char *name;
    PyObject *socket, *function, *guard, *held;
    PyTypeObject *type;
    if (!PyArg_ParseTuple(args, "sO!UUUO!", &name, &PyFunction_Type, &function, &socket, &guard,
                          &held, &PyType_Type, &type))
        return NULL;
    struct kind *kind = kind_named(name);
    PyObject *method = kind != NULL ? PyObject_GetAttrString(function, "__name__") : NULL;
    if (method == NULL)
        return NULL;
    Py_XSETREF(kind->method, interned(method));
    Py_DECREF(method);
    Py_XSETREF(kind->function, Py_NewRef(function));
    Py_XSETREF(kind->socket, interned(socket));
    Py_XSETREF(kind->guard, interned(guard));
    Py_XSETREF(kind->held, interned(held));
    Py_XSETREF(kind->guard_type, (PyTypeObject *)Py_NewRef((PyObject *)type));
    Py_RETURN_NONE;
}

/* ---- The functions ----------------------------------------------------------------------- */

static PyObject *new_op(struct kind *kind, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "%s() takes 2 arguments", kind->name);
    if (kind->twin == NULL)
        return PyErr_Format(PyExc_RuntimeError, "%s() has no twin yet", kind->name);
    return op_new(kind, args[0], args[1]);
}

#define NEW_OP(kind)                                                                              \
    static PyObject *new_##kind(PyObject *module, PyObject *const *args, Py_ssize_t count)        \
    {                                                                                             \
        return new_op(&kind, args, count);                                                        \
    }
NEW_OP(perform)
NEW_OP(perform_shielded)
NEW_OP(socket_recv)
NEW_OP(socket_recv_into)
NEW_OP(socket_send)
NEW_OP(socket_attempt)
NEW_OP(stream_receive_some)
NEW_OP(stream_send_all)
NEW_OP(anyio_receive)
NEW_OP(anyio_send)

#define FUNCTION(name, function) {name, (PyCFunction)(void *)function, METH_FASTCALL, NULL}
static PyMethodDef functions[] = {
    {"setup", setup, METH_VARARGS, NULL},
    {"set_twin", set_twin, METH_VARARGS, NULL},
    {"set_stream", set_stream, METH_VARARGS, NULL},
    {"set_files", set_files, METH_VARARGS, NULL},
    {"set_era", set_era, METH_O, NULL},
    {"set_paths", set_paths, METH_VARARGS, NULL},
    {"set_opened", set_opened, METH_VARARGS, NULL},
    FUNCTION("step", make_steps),
    FUNCTION("perform", new_perform),
    FUNCTION("perform_shielded", new_perform_shielded),
    FUNCTION("recv", new_socket_recv),
    FUNCTION("recv_into", new_socket_recv_into),
    FUNCTION("send", new_socket_send),
    FUNCTION("attempt", new_socket_attempt),
    FUNCTION("receive_some", new_stream_receive_some),
    FUNCTION("send_all", new_stream_send_all),
    FUNCTION("anyio_receive", new_anyio_receive),
    FUNCTION("anyio_send", new_anyio_send),
    FUNCTION("read_cached", read_cached),
    FUNCTION("read_many_cached", read_many_cached),
    FUNCTION("call_path", call_path),
    {"close_file", close_file, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", NULL, -1, functions, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    if (PyType_Ready(&OpType) < 0 || PyType_Ready(&LoopType) < 0 ||
        PyType_Ready(&FileHitType) < 0 || init_step() < 0)
        return NULL;
    PyObject *native = PyModule_Create(&module);
    if (native != NULL && (PyModule_AddObjectRef(native, "Op", (PyObject *)&OpType) < 0 ||
                           PyModule_AddObjectRef(native, "Loop", (PyObject *)&LoopType) < 0 ||
                           PyModule_AddObjectRef(native, "FileHit", (PyObject *)&FileHitType) < 0))
        Py_CLEAR(native);
    return native;
}
