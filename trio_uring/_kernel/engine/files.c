/*
 * Reads of data in the page cache, directly into bytes objects. They do not wait. What cannot be read
 * without waiting, or at all, Python leaves to the ring, which reports the errors.
 */
#include "engine.h"
#include "preadv2.h"

#define READ_MAX (256 * 1024) /* as INLINE_MAX in _bridge.py: what one call may copy */

static ssize_t read_now(int fd, void *memory, size_t size, int64_t offset)
{
    return read_with_flags(fd, memory, size, offset, URING_RWF_NOWAIT);
}

/* Return the bytes; None if they are not all in the page cache; NULL with an exception. */
static PyObject *read_part(int fd, Py_ssize_t size, long long offset)
{
    if (size < 0 || size > READ_MAX || offset < 0)
        return Py_NewRef(Py_None);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, size);
    if (bytes == NULL)
        return NULL;
    ssize_t count = read_now(fd, PyBytes_AS_STRING(bytes), (size_t)size, offset);
    if (count == size)
        return bytes;
    char next;
    if (count == 0 || (count > 0 && read_now(fd, &next, 1, offset + count) == 0)) {
        _PyBytes_Resize(&bytes, count); /* the file ends there */
        return bytes;
    }
    Py_DECREF(bytes);
    return Py_NewRef(Py_None);
}

/* Set *value to an int; return false, without an exception, if object is none or does not fit. */
static int get_int(PyObject *object, long long *value)
{
    if (!PyLong_CheckExact(object))
        return 0;
    *value = PyLong_AsLongLong(object);
    if (*value == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return 1;
}

/* read_cached(fd, size, offset): the bytes of one part of a file, or None. */
PyObject *read_cached(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    long long fd, size, offset;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "read_cached() takes 3 arguments");
    if (!get_int(args[0], &fd) || !get_int(args[1], &size) || !get_int(args[2], &offset))
        return Py_NewRef(Py_None);
    return read_part((int)fd, (Py_ssize_t)size, offset);
}

/* read_many_cached(fd, parts, found): append the same of each (size, offset) in the list parts to the
 * list found, from the index on that its length is: as many as one call may copy, but at least one.
 * Returns how many of them are None. */
PyObject *read_many_cached(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    long long fd, size, offset;
    if (count != 3 || !get_int(args[0], &fd) || !PyList_CheckExact(args[1]) ||
        !PyList_CheckExact(args[2]))
        return PyErr_Format(PyExc_TypeError, "read_many_cached() takes an int and two lists");
    PyObject *parts = args[1], *found = args[2];
    long missing = 0;
    Py_ssize_t left = READ_MAX;
    for (Py_ssize_t i = PyList_GET_SIZE(found); left > 0 && i < PyList_GET_SIZE(parts); i++) {
        PyObject *part = PyList_GET_ITEM(parts, i), *bytes;
        if (PyTuple_CheckExact(part) && PyTuple_GET_SIZE(part) == 2 &&
            get_int(PyTuple_GET_ITEM(part, 0), &size) && get_int(PyTuple_GET_ITEM(part, 1), &offset))
            bytes = read_part((int)fd, (Py_ssize_t)size, offset);
        else
            bytes = Py_NewRef(Py_None);
        int appended = bytes == NULL ? -1 : PyList_Append(found, bytes);
        missing += bytes == Py_None;
        left -= bytes != NULL && bytes != Py_None ? PyBytes_GET_SIZE(bytes) + 64 : 64;
        Py_XDECREF(bytes);
        if (appended < 0)
            return NULL;
    }
    return PyLong_FromLong(missing);
}
