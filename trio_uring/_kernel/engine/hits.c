/*
 * Calls on files that need neither the ring nor a greenlet: what they read is in memory already.
 *
 * A FileHit is one method of one file. Calling it makes the call, and returns what that returns or
 * raises what it raises. It returns OTHERWISE instead if the caller must do more:
 *
 *   due      the call is done, and take() returns or raises its result, but a schedule point is due
 *   missed   the data are not in the page cache; take() returns what was read of them, or None
 *   neither  nothing was tried: the file or the arguments are unusual, or the task is cancelled
 *
 * Its twin is PythonHit in _files/_hits.py.
 *
 * Buffered files have their own word for "not now": a raw readinto() that returns None. They return
 * what they have, and lose nothing. So while a FileHit calls a method, the readinto() and readall()
 * of the raw file below use preadv2(RWF_NOWAIT), and return None if that would wait.
 */
#include "engine.h"
#include "preadv2.h"

enum what { SIMPLE, READ, READINTO, RAW_READ, RAW_READINTO, TEXT_LINE, TEXT_READ };

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *raw;    /* the RingFileIO */
    PyObject *method; /* the bound method */
    PyObject *value;  /* for take() */
    int what, flags;
    Py_ssize_t budget; /* how many bytes a call may copy before other tasks run */
    char due, missed, failed; /* failed: value is an exception */
} FileHit;

PyObject *otherwise;
PyObject *era;
static PyObject *get_fileno; /* FileIO.fileno */
static PyObject *readinto_twin, *readall_twin;
static PyObject *busy_name, *direct_name, *lines_name;
static Py_ssize_t inline_max;

/* ---- Reading without waiting ----------------------------------------------------------- */

struct attempt {
    PyObject *raw;
    int flags, missed;
    Py_ssize_t left; /* of the budget */
    PyObject *ahead; /* what readall() returns, if it was called ahead; otherwise NULL */
};
static _Thread_local struct attempt *attempt;

/* Read once at the file's position, which moves. Returns -1 if that would wait, or failed: then
 * the bridge reads again, and meets the error again. The GIL is held: copying takes less time than
 * getting it back. */
static Py_ssize_t read_now(struct attempt *now, void *buffer, Py_ssize_t size)
{
    now->missed = 1;
    if (now->left <= 0 && size > 0)
        return -1;
    if (size > now->left)
        size = now->left;
    PyObject *number = PyObject_Vectorcall(get_fileno, &now->raw, 1, NULL);
    long fd = number != NULL ? PyLong_AsLong(number) : -1;
    Py_XDECREF(number);
    if (fd < 0) { /* closed */
        PyErr_Clear();
        return -1;
    }
    Py_ssize_t count = read_with_flags((int)fd, buffer, (size_t)size, -1, now->flags);
    if (count < 0)
        return -1;
    now->missed = 0;
    now->left -= count;
    return count;
}

/* Read until the buffer is full, or the file ends, or the rest would wait. */
static Py_ssize_t fill_now(struct attempt *now, char *buffer, Py_ssize_t size)
{
    Py_ssize_t done = 0, count;
    do {
        count = read_now(now, buffer + done, size - done);
        done += count > 0 ? count : 0;
    } while (count > 0 && done < size);
    return done;
}

/* Move the position back by done bytes, which are not used. */
static PyObject *give_up(struct attempt *now, Py_ssize_t done)
{
    now->missed = 1;
    PyObject *moved =
        done > 0 ? PyObject_CallMethod(now->raw, "seek", "ni", -done, SEEK_CUR) : Py_NewRef(Py_None);
    if (moved == NULL)
        return NULL;
    Py_DECREF(moved);
    Py_RETURN_NONE;
}

/* Read to the end of the file, or nothing. Most files that are read whole are short. */
static PyObject *read_all_now(struct attempt *now)
{
    static char scratch[65536 + 1]; /* one more, to see that a file of 64 KiB ends */
    Py_ssize_t done = fill_now(now, scratch, sizeof scratch);
    if (done < (Py_ssize_t)sizeof scratch && !now->missed)
        return PyBytes_FromStringAndSize(scratch, done);
    return give_up(now, done); /* the bridge reads into the final object, which saves a copy */
}

/* RingFileIO.readinto and readall. */

static PyObject *raw_readinto(PyObject *raw, PyObject *buffer)
{
    struct attempt *now = attempt;
    Py_buffer view;
    if (now == NULL || now->raw != raw)
        return PyObject_CallFunctionObjArgs(readinto_twin, raw, buffer, NULL);
    if (PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) < 0)
        return NULL;
    Py_ssize_t done = fill_now(now, view.buf, view.len);
    PyBuffer_Release(&view);
    /* With a part, CPython's buffer would differ from what one read(2) leaves in it. */
    return now->missed ? give_up(now, done) : PyLong_FromSsize_t(done);
}

static PyObject *raw_readall(PyObject *raw, PyObject *unused)
{
    struct attempt *now = attempt;
    if (now == NULL || now->raw != raw)
        return PyObject_CallOneArg(readall_twin, raw);
    PyObject *ahead = now->ahead;
    now->ahead = NULL;
    return ahead != NULL ? ahead : read_all_now(now);
}

static PyMethodDef raw_methods[] = {
    {"readinto", raw_readinto, METH_O, "See `io.RawIOBase.readinto`."},
    {"readall", raw_readall, METH_NOARGS, "See `io.RawIOBase.readall`."},
};

/* ---- The calls ------------------------------------------------------------------------- */

/* Only a few types have no code of the program's, which could look at the context. */
static int are_ints(PyObject *const *args, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        if (!PyLong_CheckExact(args[i]))
            return 0;
    return 1;
}

/* Get the argument of read() or readline(); -1 if there is none. Returns 0 if it is unusual. */
static int get_size(PyObject *const *args, Py_ssize_t count, Py_ssize_t *size)
{
    *size = -1;
    if (count == 0 || (count == 1 && args[0] == Py_None))
        return 1;
    if (count != 1 || !PyLong_CheckExact(args[0]))
        return 0;
    *size = PyLong_AsSsize_t(args[0]);
    if (*size == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return *size <= inline_max;
}

static int is_buffer(PyObject *const *args, Py_ssize_t count)
{
    return count == 1 && (PyByteArray_CheckExact(args[0]) || PyMemoryView_Check(args[0]));
}

static PyObject *of_raw(FileHit *hit, PyObject *name)
{
    PyObject **dict = _PyObject_GetDictPtr(hit->raw);
    return dict != NULL && *dict != NULL ? PyDict_GetItemWithError(*dict, name) : NULL;
}

/* Whether the next line of a text file is decoded already. If so, count it as read. */
static int take_line(FileHit *hit)
{
    PyObject *lines = of_raw(hit, lines_name);
    Py_ssize_t left = lines != NULL && PyLong_CheckExact(lines) ? PyLong_AsSsize_t(lines) : 0;
    if (left <= 0)
        return 0;
    PyObject *fewer = PyLong_FromSsize_t(left - 1);
    int set = fewer == NULL ? -1 : PyDict_SetItem(*_PyObject_GetDictPtr(hit->raw), lines_name, fewer);
    Py_XDECREF(fewer);
    return set < 0 ? -1 : 1;
}

/* Whether the call may be tried. */
static int may_try(FileHit *hit, PyObject *const *args, Py_ssize_t count)
{
    PyObject *busy = of_raw(hit, busy_name);
    Py_ssize_t size;
    if (busy != NULL && busy != Py_False)
        return 0;
    if (hit->what != SIMPLE && of_raw(hit, direct_name) != era)
        return 0;
    switch (hit->what) {
    case SIMPLE:
        return are_ints(args, count);
    case READINTO:
    case RAW_READINTO:
        return is_buffer(args, count);
    case TEXT_READ:
        return get_size(args, count, &size) && size < 0;
    default:
        return get_size(args, count, &size);
    }
}

static PyObject *read_raw(FileHit *hit, PyObject *const *args, Py_ssize_t count)
{
    Py_ssize_t size;
    get_size(args, count, &size);
    if (size < 0)
        return read_all_now(attempt);
    PyObject *data = PyBytes_FromStringAndSize(NULL, size);
    if (data != NULL) {
        Py_ssize_t done = fill_now(attempt, PyBytes_AS_STRING(data), size);
        if (done < size)
            _PyBytes_Resize(&data, done);
    }
    return data;
}

static PyObject *readinto_raw(FileHit *hit, PyObject *buffer)
{
    Py_buffer view;
    if (PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) < 0) {
        PyErr_Clear();
        attempt->missed = 1; /* FileIO raises the error */
        Py_RETURN_NONE;
    }
    Py_ssize_t done = fill_now(attempt, view.buf, view.len);
    PyBuffer_Release(&view);
    return PyLong_FromSsize_t(done);
}

/* Read all the text. A text file would take None for the end of the file, so all that it will read is
 * read first. */
static PyObject *read_text(FileHit *hit, PyObject *const *args, Py_ssize_t count)
{
    attempt->ahead = read_all_now(attempt);
    if (attempt->ahead == NULL || attempt->missed) {
        PyObject *nothing = attempt->ahead;
        attempt->ahead = NULL;
        return nothing;
    }
    PyObject *zero = PyLong_FromLong(0); /* no line is left afterwards */
    int set = zero == NULL ? -1 : PyDict_SetItem(*_PyObject_GetDictPtr(hit->raw), lines_name, zero);
    Py_XDECREF(zero);
    PyObject *text = set < 0 ? NULL : PyObject_Vectorcall(hit->method, args, (size_t)count, NULL);
    Py_CLEAR(attempt->ahead);
    return text;
}

/* Make the call. Returns its result, and sets missed if that is not all. */
static PyObject *make_call(FileHit *hit, PyObject *const *args, Py_ssize_t count, int *missed)
{
    *missed = 0;
    if (hit->what == SIMPLE || hit->what == TEXT_LINE)
        return PyObject_Vectorcall(hit->method, args, (size_t)count, NULL);
    struct attempt now = {hit->raw, hit->flags, 0, hit->budget, NULL}, *outer = attempt;
    PyObject *value;
    attempt = &now;
    if (hit->what == RAW_READ)
        value = read_raw(hit, args, count);
    else if (hit->what == RAW_READINTO)
        value = readinto_raw(hit, args[0]);
    else if (hit->what == TEXT_READ)
        value = read_text(hit, args, count);
    else
        value = PyObject_Vectorcall(hit->method, args, (size_t)count, NULL);
    attempt = outer;
    *missed = now.missed;
    return value;
}

/* Keep what take() returns or raises. The reference to value is stolen. */
static PyObject *leave(FileHit *hit, PyObject *value, int due)
{
    hit->failed = value == NULL;
    hit->due = (char)due;
    hit->missed = !due;
    Py_XSETREF(hit->value, value != NULL ? value : PyErr_GetRaisedException());
    return Py_NewRef(otherwise);
}

static PyObject *hit_call(FileHit *hit, PyObject *const *args, size_t nargs, PyObject *names)
{
    Py_ssize_t count = PyVectorcall_NARGS(nargs);
    Loop *loop = current_loop();
    int may = names == NULL && loop != NULL && loop->has_files && !is_cancelled(loop) &&
              may_try(hit, args, count);
    if (may && hit->what == TEXT_LINE)
        may = take_line(hit);
    if (PyErr_Occurred())
        return NULL;
    if (!may)
        return Py_NewRef(otherwise);
    int missed;
    PyObject *value = make_call(hit, args, count, &missed);
    if (missed && value != NULL)
        return leave(hit, value, 0);
    loop->file_hits++;
    PyObject *error = value == NULL ? PyErr_GetRaisedException() : NULL;
    int young = pass_cancel_point(loop);
    if (young < 0) {
        Py_XDECREF(value);
        Py_XDECREF(error);
        return NULL;
    }
    if (error != NULL)
        PyErr_SetRaisedException(error);
    return young ? value : leave(hit, value, 1);
}

/* take(): returns or raises what a call has left, and forgets it. */
static PyObject *hit_take(FileHit *hit, PyObject *unused)
{
    PyObject *value = hit->value;
    int failed = hit->failed;
    hit->value = NULL;
    hit->due = hit->missed = hit->failed = 0;
    if (failed && value != NULL) {
        PyErr_SetRaisedException(value);
        return NULL;
    }
    return value != NULL ? value : Py_NewRef(Py_None);
}

/* ---- The type -------------------------------------------------------------------------- */

static PyObject *hit_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"what", "raw", "method", "flags", NULL};
    int what, flags;
    PyObject *raw, *method;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOOi", names, &what, &raw, &method, &flags))
        return NULL;
    FileHit *hit = (FileHit *)type->tp_alloc(type, 0);
    if (hit == NULL)
        return NULL;
    hit->call = (vectorcallfunc)hit_call;
    hit->what = what;
    hit->flags = flags;
    hit->budget = inline_max;
    hit->raw = Py_NewRef(raw);
    hit->method = Py_NewRef(method);
    return (PyObject *)hit;
}

static int hit_traverse(FileHit *hit, visitproc visit, void *arg)
{
    Py_VISIT(hit->raw);
    Py_VISIT(hit->method);
    Py_VISIT(hit->value);
    return 0;
}

static int hit_clear(FileHit *hit)
{
    Py_CLEAR(hit->raw);
    Py_CLEAR(hit->method);
    Py_CLEAR(hit->value);
    return 0;
}

static void hit_dealloc(FileHit *hit)
{
    PyObject_GC_UnTrack(hit);
    hit_clear(hit);
    Py_TYPE(hit)->tp_free(hit);
}

static PyMethodDef hit_methods[] = {
    {"take", (PyCFunction)hit_take, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef hit_members[] = {
    {"due", T_BOOL, offsetof(FileHit, due), READONLY, NULL},
    {"missed", T_BOOL, offsetof(FileHit, missed), READONLY, NULL},
    {"flags", T_INT, offsetof(FileHit, flags), 0, NULL},
    {"budget", T_PYSSIZET, offsetof(FileHit, budget), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject FileHitType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "trio_uring._kernel._native.FileHit",
    .tp_basicsize = sizeof(FileHit),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = hit_new,
    .tp_dealloc = (destructor)hit_dealloc,
    .tp_traverse = (traverseproc)hit_traverse,
    .tp_clear = (inquiry)hit_clear,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(FileHit, call),
    .tp_methods = hit_methods,
    .tp_members = hit_members,
};

/* ---- Setup ----------------------------------------------------------------------------- */

/* set_files(raw_type, fileno, readinto, readall, otherwise, inline_max): called once. Replaces the
 * methods readinto and readall of raw_type. */
PyObject *set_files(PyObject *module, PyObject *args)
{
    PyTypeObject *type;
    PyObject *get_fd, *readinto, *readall, *sentinel;
    if (!PyArg_ParseTuple(args, "O!OOOOn", &PyType_Type, &type, &get_fd, &readinto, &readall,
                          &sentinel, &inline_max))
        return NULL;
    busy_name = PyUnicode_InternFromString("busy");
    direct_name = PyUnicode_InternFromString("direct");
    lines_name = PyUnicode_InternFromString("lines");
    if (busy_name == NULL || direct_name == NULL || lines_name == NULL)
        return NULL;
    get_fileno = Py_NewRef(get_fd);
    readinto_twin = Py_NewRef(readinto);
    readall_twin = Py_NewRef(readall);
    otherwise = Py_NewRef(sentinel);
    for (size_t i = 0; i < sizeof raw_methods / sizeof *raw_methods; i++) {
        PyObject *method = PyDescr_NewMethod(type, &raw_methods[i]);
        int set = method == NULL ? -1
                                 : PyObject_SetAttrString((PyObject *)type, raw_methods[i].ml_name,
                                                          method);
        Py_XDECREF(method);
        if (set < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

/* set_era(era): files whose `direct` is another object must not be read directly. */
PyObject *set_era(PyObject *module, PyObject *now)
{
    Py_XSETREF(era, Py_NewRef(now));
    Py_RETURN_NONE;
}
