/*
 * Opens files to read them, and closes them: what needs neither the ring nor a thread.
 *
 * The twins are open_file() in _files/_open.py and close() in _files/_methods.py.
 */
#include "engine.h"

#include <unistd.h>

static PyTypeObject *raw_type;      /* RingFileIO */
static PyTypeObject *buffered_type; /* io.BufferedReader */
static PyTypeObject *text_type;     /* io.TextIOWrapper */
static PyObject *known;             /* dict: the kind of the file system in each mount */
static PyObject *file_system_of;    /* Python's, for other mounts */
static PyObject *server, *memory;   /* two kinds */
static PyObject *buffer_attribute, *raw_attribute, *name_attribute, *size_attribute, *close_name,
    *writable_name, *mode_attribute;
static PyObject *busy_name, *direct_name, *used_ring_name, *file_system_name, *streams_name,
    *era_name, *flags_name, *counts_lines_name; /* of RingFileIO's attributes */

/* ---- Opening --------------------------------------------------------------------------- */

/* As RingFileIO.__init__ and set_private, for a regular file that is only read. */
static int set_attributes(PyObject *raw, int fd, uint64_t mount)
{
    PyObject *number = PyLong_FromUnsignedLongLong(mount);
    PyObject *kind = number != NULL ? PyDict_GetItemWithError(known, number) : NULL;
    Py_XINCREF(kind);
    Py_XDECREF(number);
    if (kind == NULL && !PyErr_Occurred())
        kind = PyObject_CallFunction(file_system_of, "i", fd);
    PyObject **dict = _PyObject_GetDictPtr(raw), *zero = PyLong_FromLong(0);
    int result = -1;
    if (kind != NULL && zero != NULL && dict != NULL && *dict != NULL)
        result = PyDict_SetItem(*dict, file_system_name, kind) < 0 ||
                         PyDict_SetItem(*dict, streams_name, Py_False) < 0 ||
                         PyDict_SetItem(*dict, era_name, era) < 0 ||
                         (kind != server && PyDict_SetItem(*dict, direct_name, era) < 0) ||
                         (kind == memory && PyDict_SetItem(*dict, flags_name, zero) < 0)
                     ? -1
                     : 0;
    Py_XDECREF(kind);
    Py_XDECREF(zero);
    return result;
}

/* Return a RingFileIO of fd, which it owns from now on; on an error, fd is closed. */
static PyObject *make_raw(int fd, PyObject *path, uint64_t mount)
{
    PyObject *args = Py_BuildValue("(is)", fd, "r");
    PyObject *raw = args != NULL ? raw_type->tp_new(raw_type, args, NULL) : NULL;
    /* Not by way of RingFileIO.__init__, which has to find out what is known here. */
    int result = raw != NULL ? raw_type->tp_base->tp_init(raw, args, NULL) : -1;
    Py_XDECREF(args);
    if (result < 0)
        close(fd);
    else if (PyObject_SetAttr(raw, name_attribute, path) < 0 || set_attributes(raw, fd, mount) < 0)
        result = -1;
    if (result < 0)
        Py_CLEAR(raw);
    return raw;
}

/* As _buffer_size() in _open.py. */
static PyObject *buffer_size(PyObject *raw)
{
    PyObject *size = PyObject_GetAttr(raw, size_attribute);
#if PY_VERSION_HEX >= 0x030e0000
    long least = 128 * 1024, most = 8192 * 1024, value = size != NULL ? PyLong_AsLong(size) : -1;
    Py_XDECREF(size);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    size = PyLong_FromLong(value < least ? least : value > most ? most : value);
#endif
    return size;
}

/* Make a text file of file, which is stolen, as open(path, encoding=encoding) does. It is UTF-8. */
static PyObject *text_file(PyObject *file, PyObject *raw, PyObject *encoding)
{
    PyObject *text = PyObject_CallFunction((PyObject *)text_type, "OOOOO", file, encoding, Py_None,
                                           Py_None, Py_False);
    PyObject *mode = PyUnicode_FromString("r");
    PyObject **dict = _PyObject_GetDictPtr(raw);
    Py_DECREF(file);
    if (text != NULL && (mode == NULL || PyObject_SetAttr(text, mode_attribute, mode) < 0 ||
                         /* In Python 3.10 it asked for the fd, to find the encoding. */
                         PyDict_SetItem(*dict, era_name, era) < 0 ||
                         (PyDict_GetItemWithError(*dict, file_system_name) != server &&
                          PyDict_SetItem(*dict, direct_name, era) < 0) ||
                         PyDict_SetItem(*dict, counts_lines_name, Py_True) < 0))
        Py_CLEAR(text);
    Py_XDECREF(mode);
    return text;
}

/* Return what open(path, "rb") does, of the regular file fd, in a mount; with an encoding, what
 * open(path, encoding=encoding) does. It owns fd from now on. */
PyObject *file_to_read(int fd, PyObject *path, uint64_t mount, PyObject *encoding)
{
    PyObject *raw = make_raw(fd, path, mount);
    PyObject *size = raw != NULL ? buffer_size(raw) : NULL;
    PyObject *file = NULL;
    if (size != NULL)
        file = PyObject_CallFunctionObjArgs((PyObject *)buffered_type, raw, size, NULL);
    if (file != NULL && encoding != NULL)
        file = text_file(file, raw, encoding);
    Py_XDECREF(raw);
    Py_XDECREF(size);
    return file;
}

/* ---- Closing --------------------------------------------------------------------------- */

/* Return the raw file below file, if it is a RingFileIO; NULL without an exception otherwise. */
static PyObject *raw_below(PyObject *file)
{
    PyObject *below = Py_NewRef(file);
    if (below != NULL && Py_TYPE(below) == text_type)
        Py_SETREF(below, PyObject_GetAttr(below, buffer_attribute));
    if (below != NULL && Py_TYPE(below) == buffered_type)
        Py_SETREF(below, PyObject_GetAttr(below, raw_attribute));
    if (below == NULL)
        PyErr_Clear(); /* it is detached */
    else if (Py_TYPE(below) != raw_type)
        Py_CLEAR(below);
    return below;
}

static int is_set(PyObject *dict, PyObject *name)
{
    PyObject *value = PyDict_GetItemWithError(dict, name);
    return value != NULL && value != Py_False;
}

/* Whether closing the file sends nothing, and needs nothing besides. */
static int may_close(PyObject *raw)
{
    PyObject **dict = _PyObject_GetDictPtr(raw);
    if (dict == NULL || *dict == NULL || PyDict_GetItemWithError(*dict, direct_name) != era ||
        is_set(*dict, busy_name) || is_set(*dict, used_ring_name))
        return 0;
    PyObject *writable = PyObject_CallMethodNoArgs(raw, writable_name);
    Py_XDECREF(writable);
    PyErr_Clear(); /* it is closed */
    return writable == Py_False;
}

/* close_file(file): closes it, and passes a checkpoint. Returns as call_path() in paths.c does. */
PyObject *close_file(PyObject *module, PyObject *file)
{
    Loop *loop = current_loop();
    if (loop == NULL || !loop->has_files || is_cancelled(loop))
        return PyErr_Occurred() ? NULL : Py_NewRef(otherwise);
    PyObject *raw = raw_below(file);
    int may = raw != NULL && may_close(raw);
    Py_XDECREF(raw);
    return may ? after_call(loop, PyObject_CallMethodNoArgs(file, close_name))
               : Py_NewRef(otherwise);
}

/* ---- Setup ----------------------------------------------------------------------------- */

static int set_names(void)
{
    static const struct { PyObject **name; const char *string; } names[] = {
        {&buffer_attribute, "buffer"},    {&raw_attribute, "raw"},
        {&name_attribute, "name"},        {&size_attribute, "_blksize"},
        {&close_name, "close"},           {&writable_name, "writable"},
        {&busy_name, "busy"},             {&direct_name, "direct"},
        {&used_ring_name, "used_ring"},   {&file_system_name, "file_system"},
        {&streams_name, "_streams"},      {&era_name, "_era"},
        {&flags_name, "nowait_flags"},    {&counts_lines_name, "counts_lines"},
        {&mode_attribute, "mode"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if ((*names[i].name = PyUnicode_InternFromString(names[i].string)) == NULL)
            return -1;
    return 0;
}

/* set_opened(raw_type, buffered_type, text_type, known, file_system_of, server, memory): called
 * once. */
PyObject *set_opened(PyObject *module, PyObject *args)
{
    PyTypeObject *type = &PyType_Type;
    if (!PyArg_ParseTuple(args, "O!O!O!O!OOO", type, &raw_type, type, &buffered_type, type,
                          &text_type, &PyDict_Type, &known, &file_system_of, &server, &memory))
        return NULL;
    Py_INCREF(args); /* it has all the objects */
    if (set_names() < 0)
        return NULL;
    Py_RETURN_NONE;
}
