/* Reads from several files in one call, which gives up Python's global lock once: worker threads that take it
 * back after every read wake each other up all the time. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct {
    int descriptor;
    off_t position;
    char *address;
    size_t length;
} Read;

enum { FIELDS = 4 };

static int filled(const Read *read) {
    size_t done = 0;
    while (done < read->length) {
        ssize_t count = pread(read->descriptor, read->address + done, read->length - done, read->position + done);
        if (count <= 0) return 0;
        done += count;
    }
    return 1;
}

static int parse(PyObject *fields, Read *reads, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        reads[i].descriptor = (int)PyLong_AsLong(PyTuple_GetItem(fields, FIELDS * i));
        reads[i].position = (off_t)PyLong_AsLongLong(PyTuple_GetItem(fields, FIELDS * i + 1));
        reads[i].address = PyLong_AsVoidPtr(PyTuple_GetItem(fields, FIELDS * i + 2));
        reads[i].length = PyLong_AsSize_t(PyTuple_GetItem(fields, FIELDS * i + 3));
        if (PyErr_Occurred()) return 0;
    }
    return 1;
}

PyDoc_STRVAR(fill_doc,
"fill(reads, current) -> int\n\n"
"reads: a tuple of file descriptor, position, address and length of one read after another; current: the\n"
"address of an int64 that says meanwhile which one is under way. The caller vouches for the addresses.\n"
"Returns how many were filled before one failed, was interrupted, or met the end of its file.");

static PyObject *fill(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *fields, *address, *result = NULL;
    if (!PyArg_ParseTuple(args, "O!O:fill", &PyTuple_Type, &fields, &address)) return NULL;
    Py_ssize_t count = PyTuple_Size(fields) / FIELDS;
    if (PyTuple_Size(fields) != count * FIELDS) {
        PyErr_SetString(PyExc_ValueError, "fill: four numbers a read");
        return NULL;
    }
    volatile int64_t *current = PyLong_AsVoidPtr(address);
    if (PyErr_Occurred()) return NULL;
    Read *reads = malloc((count ? count : 1) * sizeof *reads);
    if (!reads) return PyErr_NoMemory();
    if (parse(fields, reads, count)) {
        Py_ssize_t done = 0;
        Py_BEGIN_ALLOW_THREADS
        for (*current = 0; done < count && filled(&reads[done]); *current = ++done) {}
        Py_END_ALLOW_THREADS
        result = PyLong_FromSsize_t(done);
    }
    free(reads);
    return result;
}

static PyMethodDef methods[] = {{"fill", fill, METH_VARARGS, fill_doc}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_reads", "Reads from several files in one call.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__reads(void) { return PyModule_Create(&definition); }
