/* The scan of pickle_scan.py, opcode for opcode; that file says what it is for and is the reference.
 *
 * Nodes live in one array and are named by their place in it. Stack and memo hold such places; a
 * mark is MARK. The opcodes and their arguments are those of Python's pickletools. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PLAIN, ODD, FLAT, MADE, TREE };
enum { MARK = 0, FIRST = 1 };

typedef struct {
    uint64_t size;
    uint32_t depth;
    uint8_t kind, fetched;
} Node;

typedef struct {
    uint32_t *items;
    size_t count, room;
} Places;

typedef struct {
    const unsigned char *data;
    size_t length, position;
    Node *nodes;
    size_t count, room;
    Places stack, memo;
    uint64_t max_depth;
    int64_t odd_keys_left;
} Scan;

static const char DAMAGED[] = "it is damaged or cut short";
static const char NO_MEMORY[] = "";

/* Every function returns NULL, or what is wrong. */
typedef const char *Problem;
#define TRY(call)                       \
    do {                                \
        Problem found_ = (call);        \
        if (found_ != NULL) return found_; \
    } while (0)

static Problem place(Places *places, uint32_t item)
{
    if (places->count == places->room) {
        size_t room = places->room ? 2 * places->room : 256;
        uint32_t *items = realloc(places->items, room * sizeof *items);
        if (items == NULL) return NO_MEMORY;
        places->items = items;
        places->room = room;
    }
    places->items[places->count++] = item;
    return NULL;
}

static Problem push(Scan *scan, int kind)
{
    if (scan->count == scan->room) {
        size_t room = scan->room ? 2 * scan->room : 256;
        Node *nodes = realloc(scan->nodes, room * sizeof *nodes);
        if (nodes == NULL) return NO_MEMORY;
        scan->nodes = nodes;
        scan->room = room;
    }
    if (scan->count > UINT32_MAX - 1) return NO_MEMORY;
    scan->nodes[scan->count] = (Node){.size = 1, .depth = 0, .kind = (uint8_t)kind};
    return place(&scan->stack, (uint32_t)scan->count++);
}

/* A little-endian argument of the opcode. */
static Problem number(Scan *scan, int bytes, uint64_t *value)
{
    if (scan->length - scan->position < (size_t)bytes) return DAMAGED;
    *value = 0;
    for (int i = 0; i < bytes; i++)
        *value |= (uint64_t)scan->data[scan->position + i] << (8 * i);
    scan->position += bytes;
    return NULL;
}

static Problem skip(Scan *scan, uint64_t bytes)
{
    if (scan->length - scan->position < bytes) return DAMAGED;
    scan->position += bytes;
    return NULL;
}

static Problem skip_counted(Scan *scan, int bytes)
{
    uint64_t count;
    TRY(number(scan, bytes, &count));
    return skip(scan, count);
}

static Problem skip_line(Scan *scan)
{
    const unsigned char *from = scan->data + scan->position;
    const unsigned char *end = memchr(from, '\n', scan->length - scan->position);
    if (end == NULL) return DAMAGED;
    scan->position += end - from + 1;
    return NULL;
}

/* How many values lie on the last mark; the mark must be there. */
static Problem to_mark(Scan *scan, size_t *count)
{
    for (*count = 0; *count < scan->stack.count; ++*count)
        if (scan->stack.items[scan->stack.count - *count - 1] == MARK) return NULL;
    return DAMAGED;
}

static Problem has_values(Scan *scan, size_t count)
{
    if (scan->stack.count < count) return DAMAGED;
    for (size_t i = 0; i < count; i++)
        if (scan->stack.items[scan->stack.count - i - 1] == MARK) return DAMAGED;
    return NULL;
}

static Problem add(Scan *scan, Node *node, const uint32_t *parts, size_t count)
{
    uint32_t deepest = 0;
    for (size_t i = 0; i < count; i++) {
        const Node *part = &scan->nodes[parts[i]];
        if (part->depth > deepest) deepest = part->depth;
        node->size += part->size;
        if (node->size > UINT64_MAX / 4) node->size = UINT64_MAX / 4;
    }
    if (node->depth < deepest + 1) node->depth = deepest + 1;
    return node->depth > scan->max_depth ? "it nests its values too deep" : NULL;
}

static Problem keys(Scan *scan, const uint32_t *parts, size_t count, size_t step)
{
    for (size_t i = 0; i < count; i += step) {
        int kind = scan->nodes[parts[i]].kind;
        if (kind == TREE) return "it has a container for a key";
        scan->odd_keys_left -= kind == ODD || kind == FLAT;
    }
    return scan->odd_keys_left < 0 ? "it has too many keys that are no text" : NULL;
}

/* Replace the last values, and a mark below them, by one that is made of them. */
static Problem make(Scan *scan, int kind, size_t count, int marked)
{
    TRY(has_values(scan, count));
    scan->stack.count -= count;
    const uint32_t *parts = scan->stack.items + scan->stack.count;
    Node made = {.size = 1, .kind = (uint8_t)kind};
    TRY(add(scan, &made, parts, count));
    if (kind == FLAT)
        for (size_t i = 0; i < count; i++)
            if (scan->nodes[parts[i]].kind > ODD) made.kind = TREE;
    scan->stack.count -= marked;
    TRY(push(scan, kind));
    scan->nodes[scan->count - 1] = made;
    return NULL;
}

static Problem make_from_mark(Scan *scan, int kind)
{
    size_t count;
    TRY(to_mark(scan, &count));
    if (kind == TREE) /* a frozenset */
        TRY(keys(scan, scan->stack.items + scan->stack.count - count, count, 1));
    return make(scan, kind, count, 1);
}

/* Add the last values, and drop a mark below them, to the one before; every step-th is a key. */
static Problem change(Scan *scan, size_t count, int marked, size_t step)
{
    TRY(has_values(scan, count));
    if (scan->stack.count < count + marked + 1) return DAMAGED;
    scan->stack.count -= count;
    const uint32_t *parts = scan->stack.items + scan->stack.count;
    scan->stack.count -= marked;
    uint32_t last = scan->stack.items[scan->stack.count - 1];
    if (last == MARK || scan->nodes[last].kind < MADE) return DAMAGED;
    if (scan->nodes[last].fetched) return "it changes a value that it has fetched from its memo";
    if (step) TRY(keys(scan, parts, count, step));
    return add(scan, &scan->nodes[last], parts, count);
}

static Problem change_from_mark(Scan *scan, size_t step)
{
    size_t count;
    TRY(to_mark(scan, &count));
    return change(scan, count, 1, step);
}

static Problem put(Scan *scan, uint64_t where)
{
    if (scan->stack.count == 0) return DAMAGED;
    uint32_t last = scan->stack.items[scan->stack.count - 1];
    if (where > scan->memo.count || last == MARK) return "it does not fill its memo in order";
    if (where == scan->memo.count) return place(&scan->memo, last);
    scan->memo.items[where] = last;
    return NULL;
}

static Problem get(Scan *scan, uint64_t where)
{
    if (where >= scan->memo.count) return DAMAGED;
    scan->nodes[scan->memo.items[where]].fetched = 1;
    return place(&scan->stack, scan->memo.items[where]);
}

static Problem put_at(Scan *scan, int bytes)
{
    uint64_t where;
    TRY(number(scan, bytes, &where));
    return put(scan, where);
}

static Problem get_at(Scan *scan, int bytes)
{
    uint64_t where;
    TRY(number(scan, bytes, &where));
    return get(scan, where);
}

static Problem step(Scan *scan, unsigned char opcode)
{
    switch (opcode) {
    case 0x80: return skip(scan, 1);                         /* PROTO */
    case 0x95: return skip(scan, 8);                         /* FRAME */
    case '.': return NULL;                                   /* STOP */
    case 'N': case 0x88: case 0x89: return push(scan, PLAIN); /* NONE, NEWTRUE, NEWFALSE */
    case 'K': TRY(skip(scan, 1)); return push(scan, PLAIN);  /* BININT1 */
    case 'M': TRY(skip(scan, 2)); return push(scan, PLAIN);  /* BININT2 */
    case 'J': TRY(skip(scan, 4)); return push(scan, PLAIN);  /* BININT */
    case 'C': case 0x8c: TRY(skip_counted(scan, 1)); return push(scan, PLAIN); /* SHORT_BIN… */
    case 'B': case 'X': TRY(skip_counted(scan, 4)); return push(scan, PLAIN);  /* BIN… */
    case 0x8e: case 0x8d: TRY(skip_counted(scan, 8)); return push(scan, PLAIN); /* BIN…8 */
    case 'G': TRY(skip(scan, 8)); return push(scan, ODD);    /* BINFLOAT */
    case 0x8a: TRY(skip_counted(scan, 1)); return push(scan, ODD); /* LONG1 */
    case 0x8b: TRY(skip_counted(scan, 4)); return push(scan, ODD); /* LONG4 */
    case ']': case '}': case 0x8f: return push(scan, TREE);  /* EMPTY_LIST, _DICT, _SET */
    case ')': return push(scan, FLAT);                       /* EMPTY_TUPLE */
    case 'c':                                                /* GLOBAL */
        TRY(skip_line(scan));
        TRY(skip_line(scan));
        return push(scan, MADE);
    case 0x94: return put(scan, scan->memo.count);           /* MEMOIZE */
    case 'q': return put_at(scan, 1);                        /* BINPUT */
    case 'r': return put_at(scan, 4);                        /* LONG_BINPUT */
    case 'h': return get_at(scan, 1);                        /* BINGET */
    case 'j': return get_at(scan, 4);                        /* LONG_BINGET */
    case '(': return place(&scan->stack, MARK);              /* MARK */
    case 0x85: case 0x86: case 0x87: return make(scan, FLAT, opcode - 0x84, 0); /* TUPLE1… */
    case 't': return make_from_mark(scan, FLAT);             /* TUPLE */
    case 0x91: return make_from_mark(scan, TREE);            /* FROZENSET */
    case 'R': case 0x81: case 0x93: return make(scan, MADE, 2, 0); /* REDUCE, NEWOBJ, STACK_GLOBAL */
    case 'Q': return make(scan, MADE, 1, 0);                 /* BINPERSID */
    case 'a': case 'b': return change(scan, 1, 0, 0);        /* APPEND, BUILD */
    case 's': return change(scan, 2, 0, 2);                  /* SETITEM */
    case 'e': return change_from_mark(scan, 0);              /* APPENDS */
    case 'u': return change_from_mark(scan, 2);              /* SETITEMS */
    case 0x90: return change_from_mark(scan, 1);             /* ADDITEMS */
    default: return "it uses an opcode that no checkpoint needs";
    }
}

static Problem run(Scan *scan, uint64_t max_size)
{
    unsigned char opcode = 0;
    while (opcode != '.') {
        if (scan->position == scan->length) return DAMAGED;
        opcode = scan->data[scan->position++];
        TRY(step(scan, opcode));
    }
    if (scan->position != scan->length || scan->stack.count != 1 || scan->stack.items[0] == MARK)
        return "it does not end where its value does";
    if (scan->nodes[scan->stack.items[0]].size > max_size)
        return "it holds one value in another too often";
    return NULL;
}

static PyObject *scan(PyObject *module, PyObject *args)
{
    PyObject *data;
    char *bytes;
    Py_ssize_t length;
    unsigned long long max_depth, max_size;
    long long max_odd_keys;
    (void)module;
    if (!PyArg_ParseTuple(args, "SKKL:scan", &data, &max_depth, &max_size, &max_odd_keys))
        return NULL;
    if (PyBytes_AsStringAndSize(data, &bytes, &length) < 0) return NULL;
    Scan state = {
        .data = (const unsigned char *)bytes,
        .length = (size_t)length,
        .max_depth = max_depth,
        .odd_keys_left = max_odd_keys,
    };
    Problem problem;
    Py_BEGIN_ALLOW_THREADS
    problem = push(&state, TREE); /* place 0 is the mark's */
    state.stack.count = 0;
    if (problem == NULL) problem = run(&state, max_size);
    free(state.nodes);
    free(state.stack.items);
    free(state.memo.items);
    Py_END_ALLOW_THREADS
    if (problem == NO_MEMORY) return PyErr_NoMemory();
    if (problem == NULL) Py_RETURN_NONE;
    return PyUnicode_FromString(problem);
}

static PyMethodDef methods[] = {
    {"scan", scan, METH_VARARGS,
     "scan(data: bytes, max_depth, max_size, max_odd_keys) -> str | None\n\n"
     "What is wrong with a pickle; None for nothing."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_pickle_scan", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__pickle_scan(void)
{
    return PyModule_Create(&definition);
}
