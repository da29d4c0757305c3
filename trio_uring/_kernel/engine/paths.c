/*
 * Calls on paths that the kernel's cache can answer: one function of C for each whole call.
 *
 * call_path(function, args) makes the call, and returns or raises what it does. It returns OTHERWISE
 * instead if anything is unusual, or if the call might wait: then nothing was done, and Python makes
 * the call (_files/_quick.py, which is the specification). If a schedule point is due after the call,
 * it returns the tuple (result,) or (None, error). No call has a tuple as its result. It also closes
 * files: see opened.c.
 */
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <langinfo.h>
#include <sys/stat.h>
#include <unistd.h>

/* What a function does. The numbers are those of _quick.py. */
enum what { STATUS, TEST, READ_BYTES, READ_TEXT, OPEN, OPEN_WRAPPED };

/* A function, and what must be the standard library's for our call to be right. */
struct row {
    int what;
    int flags;        /* O_NOFOLLOW, or 0 */
    unsigned type;    /* the type of file that a test is for; 0 for any */
    PyObject *kinds;  /* the types that its first argument, the path, may have */
    PyObject *owners, *names, *things;
};

static PyObject *rows_by_function; /* dict: the index in rows */
static struct row *rows;
static Py_ssize_t row_count;
static PyObject *get_status; /* os.fstat */
static PyObject *wrap_file;
static PyTypeObject *partial_type;
static Py_ssize_t string_slot, parts_slot; /* of paths; -1 if there are none */
static Py_ssize_t size_max;
static int is_utf8; /* whether text is UTF-8 whatever the locale is */
static PyObject *func_name, *args_name, *keywords_name, *encoding_name, *follow_name,
    *slash;

/* ---- The path -------------------------------------------------------------------------- */

struct path {
    PyObject *string;
    PyObject *encoded; /* NULL if string has the memory */
    const char *bytes;
};

/* Whether parsing the ASCII string of a path certainly changes nothing: see _is_normal in
 * _directories.py. */
static int is_normal(PyObject *string)
{
    if (!PyUnicode_CheckExact(string) || !PyUnicode_IS_COMPACT_ASCII(string))
        return 0;
    const char *s = (const char *)PyUnicode_1BYTE_DATA(string);
    Py_ssize_t size = PyUnicode_GET_LENGTH(string);
    if (size == 0 || s[size - 1] == '/' || s[size - 1] == '.' || strncmp(s, "./", 2) == 0)
        return 0;
    return strstr(s, "//") == NULL && strstr(s, "/./") == NULL;
}

/* Return str(path) of a new path, if it needs no parsing; NULL without an exception otherwise. */
static PyObject *joined_parts(PyObject *parts)
{
    if (parts == NULL || !PyList_CheckExact(parts) || PyList_GET_SIZE(parts) == 0)
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(parts);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *part = PyList_GET_ITEM(parts, i);
        if (!is_normal(part) || (i > 0 && PyUnicode_READ_CHAR(part, 0) == '/'))
            return NULL;
    }
    PyObject *whole =
        count == 1 ? Py_NewRef(PyList_GET_ITEM(parts, 0)) : PyUnicode_Join(slash, parts);
    if (whole == NULL)
        PyErr_Clear();
    return whole;
}

static PyObject *string_of(PyObject *path)
{
    if (PyUnicode_CheckExact(path))
        return Py_NewRef(path);
    PyObject *string = string_slot >= 0 ? SLOT(path, string_slot) : NULL;
    if (string != NULL && PyUnicode_CheckExact(string))
        return Py_NewRef(string);
    string = parts_slot >= 0 ? joined_parts(SLOT(path, parts_slot)) : NULL;
    return string != NULL ? string : PyObject_Str(path);
}

/* Return false, without an exception, if the path is unusual. */
static int get_path(PyObject *object, struct path *path)
{
    char *bytes = NULL;
    Py_ssize_t size;
    path->encoded = NULL;
    path->string = string_of(object);
    if (path->string != NULL && PyUnicode_IS_COMPACT_ASCII(path->string)) {
        bytes = (char *)PyUnicode_1BYTE_DATA(path->string);
        size = PyUnicode_GET_LENGTH(path->string);
    } else if (path->string != NULL) {
        path->encoded = PyUnicode_EncodeFSDefault(path->string);
        if (path->encoded != NULL)
            PyBytes_AsStringAndSize(path->encoded, &bytes, &size);
    }
    path->bytes = bytes;
    if (bytes != NULL && strlen(bytes) == (size_t)size)
        return 1;
    PyErr_Clear();
    Py_XDECREF(path->string);
    Py_XDECREF(path->encoded);
    return 0;
}

static int is_missing(int result) { return result == -ENOENT || result == -ENOTDIR; }

static PyObject *raise_missing(int result, struct path *path)
{
    errno = -result;
    return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path->string);
}

/* ---- The calls ------------------------------------------------------------------------- */

struct call {
    PyObject *function, *path;
    PyObject *const *args; /* those after the path */
    Py_ssize_t count;
    PyObject *encoding, *follow; /* keyword arguments, or NULL: follow_symlinks */
    int is_text;                 /* of a file that is opened */
};

/* PySys_Audit() converts the arguments of an event only if there are hooks, and raises no event if
 * that fails. */
static PyObject *note_hooks(void *has_hooks)
{
    *(int *)has_hooks = 1;
    PyErr_SetNone(PyExc_RuntimeError);
    return NULL;
}

/* Whether anything could see audit events. Then they must come before the file is opened, and only
 * once: Python knows how. */
static int has_audit_hooks(void)
{
    int has_hooks = 0;
    if (PySys_Audit("open", "(O&)", note_hooks, &has_hooks) < 0)
        PyErr_Clear();
    return has_hooks;
}

static PyObject *status_of(int flags, struct path *path)
{
    int fd = api->find_cached(path->bytes, flags);
    if (is_missing(fd))
        return raise_missing(fd, path);
    if (fd < 0)
        return Py_NewRef(otherwise);
    PyObject *number = PyLong_FromLong(fd);
    PyObject *status = number != NULL ? PyObject_CallOneArg(get_status, number) : NULL;
    Py_XDECREF(number);
    close(fd);
    return status;
}

static PyObject *test(struct row *row, struct path *path)
{
    struct found found;
    int result = api->look_up_cached(path->bytes, row->flags, &found);
    if (is_missing(result))
        Py_RETURN_FALSE;
    if (result < 0)
        return Py_NewRef(otherwise);
    return PyBool_FromLong(row->type == 0 || (found.mode & S_IFMT) == row->type);
}

/* Look up a file that is to be read. Returns 1 if it can be; 0 if Python must open it; -1 with an
 * exception. */
static int look_up_file(struct path *path, struct found *found)
{
    if (has_audit_hooks())
        return 0;
    int result = api->look_up_cached(path->bytes, 0, found);
    if (is_missing(result)) {
        raise_missing(result, path);
        return -1;
    }
    return result == 0 && S_ISREG(found->mode);
}

/* Return the bytes of the whole file, or OTHERWISE. */
static PyObject *read_file(struct path *path)
{
    struct found found;
    int can = look_up_file(path, &found);
    if (can < 0)
        return NULL;
    if (!can || found.size > (uint64_t)size_max)
        return Py_NewRef(otherwise);
    PyObject *data = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)found.size);
    if (data == NULL)
        return NULL;
    long size = api->read_found(path->bytes, PyBytes_AS_STRING(data), found.size);
    if (size < 0) {
        Py_DECREF(data);
        return Py_NewRef(otherwise);
    }
    if ((uint64_t)size < found.size)
        _PyBytes_Resize(&data, size);
    return data;
}

/* Decode text as TextIOWrapper does, if its newlines need no translation. Otherwise, and if it is
 * invalid, return OTHERWISE: the file is read again. The reference to data is stolen. */
static PyObject *decoded(PyObject *data)
{
    if (data == NULL || data == otherwise)
        return data;
    const char *bytes = PyBytes_AS_STRING(data);
    Py_ssize_t size = PyBytes_GET_SIZE(data);
    PyObject *text = NULL;
    if (memchr(bytes, '\r', (size_t)size) == NULL)
        text = PyUnicode_DecodeUTF8(bytes, size, NULL);
    Py_DECREF(data);
    if (text == NULL) {
        PyErr_Clear();
        return Py_NewRef(otherwise);
    }
    return text;
}

static PyObject *open_file(struct row *row, struct call *call, struct path *path)
{
    struct found found;
    int can = look_up_file(path, &found);
    if (can < 0)
        return NULL;
    int fd = can ? api->open_cached(path->bytes, O_RDONLY) : -1;
    if (fd < 0)
        return Py_NewRef(otherwise);
    PyObject *encoding = call->is_text ? call->encoding : NULL;
    PyObject *file = file_to_read(fd, path->string, found.mount, encoding);
    if (file != NULL && row->what == OPEN_WRAPPED)
        Py_SETREF(file, PyObject_CallOneArg(wrap_file, file));
    return file;
}

/* ---- Which call it is ------------------------------------------------------------------ */

/* Get a call's function and arguments. Returns false if it is none of ours. They are borrowed: the
 * caller keeps what they are in. */
static int get_call(PyObject *function, PyObject *args, struct call *call)
{
    if (PyMethod_Check(function)) {
        call->function = PyMethod_GET_FUNCTION(function);
        call->path = PyMethod_GET_SELF(function);
        call->args = &PyTuple_GET_ITEM(args, 0);
        call->count = PyTuple_GET_SIZE(args);
    } else if ((PyFunction_Check(function) || PyCFunction_Check(function)) &&
               PyTuple_GET_SIZE(args) > 0) {
        call->function = function;
        call->path = PyTuple_GET_ITEM(args, 0);
        call->args = &PyTuple_GET_ITEM(args, 0) + 1;
        call->count = PyTuple_GET_SIZE(args) - 1;
    } else {
        return 0;
    }
    return PyFunction_Check(call->function) || PyCFunction_Check(call->function);
}

static int get_keywords(PyObject *keywords, struct call *call)
{
    if (!PyDict_CheckExact(keywords) || PyDict_GET_SIZE(keywords) > 1)
        return 0;
    call->encoding = PyDict_GetItemWithError(keywords, encoding_name);
    call->follow = PyDict_GetItemWithError(keywords, follow_name);
    return PyDict_GET_SIZE(keywords) == (call->encoding != NULL) + (call->follow != NULL);
}

static int is_one_of(PyTypeObject *type, PyObject *kinds)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds); i++)
        if (PyTuple_GET_ITEM(kinds, i) == (PyObject *)type)
            return 1;
    return 0;
}

/* Whether nobody has replaced one of the functions that the call is made of. */
static int is_intact(struct row *row)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(row->owners); i++) {
        PyObject *thing = PyObject_GetAttr(PyTuple_GET_ITEM(row->owners, i),
                                           PyTuple_GET_ITEM(row->names, i));
        Py_XDECREF(thing);
        if (thing != PyTuple_GET_ITEM(row->things, i)) {
            PyErr_Clear();
            return 0;
        }
    }
    return 1;
}

static int is_string(PyObject *object, const char *string)
{
    return PyUnicode_CheckExact(object) && PyUnicode_CompareWithASCIIString(object, string) == 0;
}

/* Whether text is decoded as UTF-8, with TextIOWrapper's other defaults. */
static int is_utf8_text(PyObject *encoding)
{
    if (encoding == NULL || encoding == Py_None)
        return is_utf8 || strcmp(nl_langinfo(CODESET), "UTF-8") == 0;
    return is_string(encoding, "utf-8") || is_string(encoding, "UTF-8");
}

static int is_minus_one(PyObject *object)
{
    int overflow = 0;
    return PyLong_CheckExact(object) && PyLong_AsLongAndOverflow(object, &overflow) == -1 &&
           !overflow;
}

/* Whether a file is opened to be read, as bytes or UTF-8, and all else is open()'s default. */
static int is_plain_open(struct call *call)
{
    PyObject *const *args = call->args;
    if (call->encoding != NULL || call->count > 7)
        return 0;
    call->is_text = call->count == 0 || is_string(args[0], "r");
    if (!call->is_text && !is_string(args[0], "rb"))
        return 0;
    if (call->count > 1 && !is_minus_one(args[1]))
        return 0;
    call->encoding = call->count > 2 ? args[2] : Py_None;
    if (call->is_text ? !is_utf8_text(call->encoding) : call->encoding != Py_None)
        return 0;
    for (Py_ssize_t i = 3; i < call->count; i++) /* errors, newline, closefd, opener */
        if (args[i] != (i == 5 ? Py_True : Py_None))
            return 0;
    return 1;
}

static int are_right(struct row *row, struct call *call)
{
    if (call->follow != NULL &&
        (row->what != STATUS || row->flags != 0 || !PyBool_Check(call->follow)))
        return 0;
    if (row->what == READ_TEXT)
        return call->count + (call->encoding != NULL) <= 1 &&
               is_utf8_text(call->count > 0 ? call->args[0] : call->encoding);
    if (row->what == OPEN || row->what == OPEN_WRAPPED)
        return is_plain_open(call);
    return call->count == 0 && call->encoding == NULL;
}

static PyObject *make_call(struct row *row, struct call *call, struct path *path)
{
    switch (row->what) {
    case STATUS:
        return status_of(call->follow == Py_False ? O_NOFOLLOW : row->flags, path);
    case TEST:
        return test(row, path);
    case READ_BYTES:
        return read_file(path);
    case READ_TEXT:
        return decoded(read_file(path));
    default:
        return open_file(row, call, path);
    }
}

/* Make the call, or return OTHERWISE. */
static PyObject *try_call(struct call *call)
{
    PyObject *index = PyDict_GetItemWithError(rows_by_function, call->function);
    if (index == NULL)
        return PyErr_Occurred() ? NULL : Py_NewRef(otherwise);
    struct row *row = &rows[PyLong_AsSsize_t(index)];
    struct path path;
    if (!is_one_of(Py_TYPE(call->path), row->kinds) || !are_right(row, call) || !is_intact(row) ||
        !get_path(call->path, &path))
        return Py_NewRef(otherwise);
    PyObject *value = make_call(row, call, &path);
    Py_DECREF(path.string);
    Py_XDECREF(path.encoded);
    return value;
}

/* Pass a checkpoint after a call, or leave its schedule point to Python. */
PyObject *after_call(Loop *loop, PyObject *value)
{
    PyObject *error = value == NULL ? PyErr_GetRaisedException() : NULL;
    PyObject *left = NULL;
    int young = pass_cancel_point(loop);
    loop->file_hits++;
    if (young > 0) {
        if (error != NULL)
            PyErr_SetRaisedException(error);
        return value;
    }
    if (young == 0)
        left = error != NULL ? PyTuple_Pack(2, Py_None, error) : PyTuple_Pack(1, value);
    Py_XDECREF(value);
    Py_XDECREF(error);
    return left;
}

/* Return the file of its bound method `close`, which AnyIO calls in a thread; otherwise NULL. */
static PyObject *file_to_close(PyObject *function, PyObject *args)
{
    if (!PyCFunction_Check(function) || PyTuple_GET_SIZE(args) > 0 ||
        strcmp(((PyCFunctionObject *)function)->m_ml->ml_name, "close") != 0)
        return NULL;
    return PyCFunction_GET_SELF(function);
}

PyObject *call_path(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyTuple_CheckExact(args[1]) || rows_by_function == NULL)
        return PyErr_Format(PyExc_TypeError, "call_path() takes a function and a tuple");
    PyObject *file = file_to_close(args[0], args[1]);
    if (file != NULL)
        return close_file(module, file);
    Loop *loop = current_loop();
    if (loop == NULL || !loop->has_files || is_cancelled(loop))
        return PyErr_Occurred() ? NULL : Py_NewRef(otherwise);
    PyObject *function = args[0], *arguments = args[1], *keywords = NULL, *value = NULL;
    struct call call = {0};
    if (Py_TYPE(function) != partial_type) {
        value = get_call(function, arguments, &call) ? try_call(&call) : Py_NewRef(otherwise);
    } else {
        function = PyObject_GetAttr(args[0], func_name);
        arguments = PyObject_GetAttr(args[0], args_name);
        keywords = PyObject_GetAttr(args[0], keywords_name);
        if (function != NULL && arguments != NULL && keywords != NULL) {
            if (PyTuple_GET_SIZE(arguments) == 0)
                Py_SETREF(arguments, Py_NewRef(args[1]));
            int is_ours = (arguments == args[1] || PyTuple_GET_SIZE(args[1]) == 0) &&
                          get_keywords(keywords, &call) && get_call(function, arguments, &call);
            value = is_ours ? try_call(&call) : Py_NewRef(otherwise);
        }
        Py_XDECREF(function);
        Py_XDECREF(arguments);
        Py_XDECREF(keywords);
    }
    return value == otherwise ? value : after_call(loop, value);
}

/* ---- Setup ----------------------------------------------------------------------------- */

static Py_ssize_t offset_of(PyObject *slot)
{
    if (Py_TYPE(slot) != &PyMemberDescr_Type ||
        ((PyMemberDescrObject *)slot)->d_member->type != T_OBJECT_EX)
        return -1;
    return ((PyMemberDescrObject *)slot)->d_member->offset;
}

static int set_row(PyObject *given, struct row *row)
{
    PyObject *function;
    PyTypeObject *tuple = &PyTuple_Type;
    if (!PyArg_ParseTuple(given, "OiiIO!O!O!O!", &function, &row->what, &row->flags, &row->type,
                          tuple, &row->kinds, tuple, &row->owners, tuple, &row->names, tuple,
                          &row->things))
        return -1;
    PyObject *index = PyLong_FromSsize_t(row_count);
    int set = index == NULL ? -1 : PyDict_SetItem(rows_by_function, function, index);
    Py_XDECREF(index);
    row_count++;
    return set;
}

/* set_paths(rows, partial, string_slot, parts_slot, fstat, wrap_file, size_max, is_utf8):
 * called once. Each of rows has a function and the members of struct row. */
PyObject *set_paths(PyObject *module, PyObject *args)
{
    PyObject *given, *string, *parts;
    if (!PyArg_ParseTuple(args, "O!O!OOOOnp", &PyTuple_Type, &given, &PyType_Type, &partial_type,
                          &string, &parts, &get_status, &wrap_file, &size_max,
                          &is_utf8))
        return NULL;
    Py_INCREF(args); /* it has all the objects */
    string_slot = offset_of(string);
    parts_slot = offset_of(parts);
    func_name = PyUnicode_InternFromString("func");
    args_name = PyUnicode_InternFromString("args");
    keywords_name = PyUnicode_InternFromString("keywords");
    encoding_name = PyUnicode_InternFromString("encoding");
    follow_name = PyUnicode_InternFromString("follow_symlinks");
    slash = PyUnicode_InternFromString("/");
    rows = PyMem_Calloc((size_t)PyTuple_GET_SIZE(given) + 1, sizeof *rows);
    rows_by_function = PyDict_New();
    if (func_name == NULL || args_name == NULL || keywords_name == NULL || encoding_name == NULL ||
        follow_name == NULL || slash == NULL || rows == NULL || rows_by_function == NULL)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); i++)
        if (set_row(PyTuple_GET_ITEM(given, i), &rows[i]) < 0)
            return NULL;
    Py_RETURN_NONE;
}
