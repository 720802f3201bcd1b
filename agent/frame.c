/* Decoding and encoding of frames: see frame.h. */
#include "frame.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct cursor {
    const uint8_t *at;
    size_t left;
    bool bad;
};

static uint64_t take(struct cursor *c, size_t size) {
    uint64_t value = 0;
    if (c->left < size) {
        c->bad = true;
        c->left = 0;
        return 0;
    }
    for (size_t i = 0; i < size; i++) value |= (uint64_t)c->at[i] << (8 * i);
    c->at += size;
    c->left -= size;
    return value;
}

static uint32_t take_u32(struct cursor *c) { return (uint32_t)take(c, 4); }
static uint64_t take_u64(struct cursor *c) { return take(c, 8); }

static struct text take_text(struct cursor *c) {
    struct text t = {"", take_u32(c)};
    if (t.length > c->left) {
        c->bad = true;
        c->left = 0;
        t.length = 0;
        return t;
    }
    if (t.length) t.bytes = (const char *)c->at;
    c->at += t.length;
    c->left -= t.length;
    return t;
}

/* The number of descriptors that the request must come with. */
static int descriptors_of(const struct request *r) {
    switch (r->verb) {
    case SPAWN:
    case RUN: return r->flags & FLAG_STDIN ? 4 : 3;
    case PTY:
    case SHELL: return 1;
    default: return 0;
    }
}

static void take_fields(struct cursor *c, struct request *r) {
    switch (r->verb) {
    case HELLO: r->oldest = take_u32(c); r->newest = take_u32(c); break;
    case SPAWN: r->key = take_text(c); r->flags = take_u32(c); r->cap = take_u64(c); break;
    case SIGNAL: r->key = take_text(c); r->signal = take_u32(c); r->scope = take_u32(c); break;
    case END: r->key = take_text(c); r->scope = take_u32(c); r->deadline = take_u32(c); break;
    case STDIN: r->key = take_text(c); r->length = take_u64(c); r->eof = take_u32(c); break;
    case READ:
    case UNLINK: r->user = take_text(c); r->path = take_text(c); r->deadline = take_u32(c); break;
    case WRITE:
        r->user = take_text(c); r->path = take_text(c); r->mode = take_u32(c); r->deadline = take_u32(c);
        break;
    case RENAME:
        r->user = take_text(c); r->path = take_text(c); r->to = take_text(c); r->deadline = take_u32(c);
        break;
    case DIAL: r->port = take_u32(c); r->deadline = take_u32(c); break;
    case PTY:
    case RESIZE: r->key = take_text(c); r->rows = take_u32(c); r->columns = take_u32(c); break;
    case SHELL:
    case ACK: r->key = take_text(c); break;
    case RUN:
        r->shell = take_text(c); r->key = take_text(c); r->flags = take_u32(c); r->cap = take_u64(c);
        break;
    case ROOM:
    case LIST: break;
    default: c->bad = true;
    }
}

bool request_decode(const uint8_t *bytes, size_t length, int descriptors, struct request *out) {
    struct cursor c = {bytes, length, length > FRAME_MAX};
    memset(out, 0, sizeof *out);
    out->verb = take_u32(&c);
    out->tag = take_u32(&c);
    take_fields(&c, out);
    return !c.bad && c.left == 0 && out->tag != 0 && descriptors == descriptors_of(out);
}

bool key_valid(struct text key) {
    if (key.length < 1 || key.length > KEY_MAX) return false;
    for (uint32_t i = 0; i < key.length; i++) {
        char c = key.bytes[i];
        bool good = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
        if (!good) return false;
    }
    return true;
}

bool text_copy(struct text from, char *to, size_t size) {
    if (from.length >= size || memchr(from.bytes, 0, from.length)) return false;
    memcpy(to, from.bytes, from.length);
    to[from.length] = 0;
    return true;
}

static void put(struct frame *f, const void *bytes, size_t length) {
    if (length > FRAME_MAX - f->length) return;
    memcpy(f->bytes + f->length, bytes, length);
    f->length += length;
}

static void put_number(struct frame *f, uint64_t value, size_t size) {
    uint8_t bytes[8];
    for (size_t i = 0; i < size; i++) bytes[i] = (uint8_t)(value >> (8 * i));
    put(f, bytes, size);
}

void put_u32(struct frame *f, uint32_t value) { put_number(f, value, 4); }
void put_u64(struct frame *f, uint64_t value) { put_number(f, value, 8); }

void put_text(struct frame *f, const char *text) {
    size_t length = strlen(text);
    put_u32(f, (uint32_t)length);
    put(f, text, length);
}

void frame_start(struct frame *f, uint32_t verb, uint32_t tag) {
    f->length = 0;
    put_u32(f, verb);
    put_u32(f, tag);
}

/* The numbers of x86_64 and aarch64 are the same. */
static const char *const names[] = {
    "", "EPERM", "ENOENT", "ESRCH", "EINTR", "EIO", "ENXIO", "E2BIG", "ENOEXEC", "EBADF", "ECHILD", "EAGAIN", "ENOMEM",
    "EACCES", "EFAULT", "ENOTBLK", "EBUSY", "EEXIST", "EXDEV", "ENODEV", "ENOTDIR", "EISDIR", "EINVAL", "ENFILE",
    "EMFILE", "ENOTTY", "ETXTBSY", "EFBIG", "ENOSPC", "ESPIPE", "EROFS", "EMLINK", "EPIPE", "EDOM", "ERANGE",
    "EDEADLK", "ENAMETOOLONG", "ENOLCK", "ENOSYS", "ENOTEMPTY", "ELOOP", "", "ENOMSG", "EIDRM", "ECHRNG", "EL2NSYNC",
    "EL3HLT", "EL3RST", "ELNRNG", "EUNATCH", "ENOCSI", "EL2HLT", "EBADE", "EBADR", "EXFULL", "ENOANO", "EBADRQC",
    "EBADSLT", "", "EBFONT", "ENOSTR", "ENODATA", "ETIME", "ENOSR", "ENONET", "ENOPKG", "EREMOTE", "ENOLINK", "EADV",
    "ESRMNT", "ECOMM", "EPROTO", "EMULTIHOP", "EDOTDOT", "EBADMSG", "EOVERFLOW", "ENOTUNIQ", "EBADFD", "EREMCHG",
    "ELIBACC", "ELIBBAD", "ELIBSCN", "ELIBMAX", "ELIBEXEC", "EILSEQ", "ERESTART", "ESTRPIPE", "EUSERS", "ENOTSOCK",
    "EDESTADDRREQ", "EMSGSIZE", "EPROTOTYPE", "ENOPROTOOPT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EOPNOTSUPP",
    "EPFNOSUPPORT", "EAFNOSUPPORT", "EADDRINUSE", "EADDRNOTAVAIL", "ENETDOWN", "ENETUNREACH", "ENETRESET",
    "ECONNABORTED", "ECONNRESET", "ENOBUFS", "EISCONN", "ENOTCONN", "ESHUTDOWN", "ETOOMANYREFS", "ETIMEDOUT",
    "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "EALREADY", "EINPROGRESS", "ESTALE", "EUCLEAN", "ENOTNAM", "ENAVAIL",
    "EISNAM", "EREMOTEIO", "EDQUOT", "ENOMEDIUM", "EMEDIUMTYPE", "ECANCELED", "ENOKEY", "EKEYEXPIRED", "EKEYREVOKED",
    "EKEYREJECTED", "EOWNERDEAD", "ENOTRECOVERABLE", "ERFKILL", "EHWPOISON",
};

const char *errno_name(int error) {
    bool known = error > 0 && (size_t)error < sizeof names / sizeof *names && *names[error];
    return known ? names[error] : "EUNKNOWN";
}

/* Copies the next text into the arena as a C string; NULL (and bad) when it holds a NUL. */
static char *take_string(struct cursor *c, char **arena) {
    struct text t = take_text(c);
    char *string = *arena;
    if (c->bad || memchr(t.bytes, 0, t.length)) {
        c->bad = true;
        return NULL;
    }
    memcpy(string, t.bytes, t.length);
    string[t.length] = 0;
    *arena += t.length + 1;
    return string;
}

static void take_strings(struct cursor *c, char **arena, char **list, uint32_t count) {
    for (uint32_t i = 0; i < count && !c->bad; i++) list[i] = take_string(c, arena);
}

/* Walks over `count` texts; the number of bytes that they take as C strings. */
static size_t skip_texts(struct cursor *c, uint32_t count) {
    size_t size = 0;
    for (uint32_t i = 0; i < count && !c->bad; i++) size += (size_t)take_text(c).length + 1;
    return size;
}

int record_decode(const uint8_t *bytes, size_t length, struct record *out) {
    struct cursor walk = {bytes, length, false}, c = walk;
    memset(out, 0, sizeof *out);
    out->argc = take_u32(&walk);
    size_t strings = skip_texts(&walk, out->argc);
    out->envc = take_u32(&walk);
    strings += skip_texts(&walk, out->envc);
    strings += skip_texts(&walk, 2);
    struct text script = take_text(&walk);
    if (walk.bad || walk.left || out->argc == 0) return EINVAL;

    size_t pointers = ((size_t)out->argc + out->envc + ENV_EXTRA + 2) * sizeof(char *);
    if (!(out->arena = malloc(pointers + strings))) return ENOMEM;
    out->argv = out->arena;
    out->envp = out->argv + out->argc + 1;
    char *arena = (char *)out->arena + pointers;
    take_u32(&c);
    take_strings(&c, &arena, out->argv, out->argc);
    take_u32(&c);
    take_strings(&c, &arena, out->envp, out->envc);
    out->directory = take_string(&c, &arena);
    out->user = take_string(&c, &arena);
    out->argv[out->argc] = NULL;
    out->envp[out->envc] = NULL;
    out->script = (const uint8_t *)script.bytes;
    out->script_length = script.length;
    if (!c.bad) return 0;
    free(out->arena);
    out->arena = NULL;
    return EINVAL;
}

char control_decode(const char *line, char *key, int *status) {
    char kind = line[0];
    if ((kind != 'S' && kind != 'E') || line[1] != ' ') return 0;
    const char *start = line + 2, *end = strchr(start, ' ');
    size_t length = end ? (size_t)(end - start) : strlen(start);
    struct text text = {start, (uint32_t)length};
    if (length > KEY_MAX || !key_valid(text) || (kind == 'S') != (end == NULL)) return 0;
    memcpy(key, start, length);
    key[length] = 0;
    *status = 0;
    if (kind == 'S') return kind;
    const char *digit = end + 1;
    for (; *digit >= '0' && *digit <= '9' && digit - end <= 3; digit++) *status = *status * 10 + (*digit - '0');
    return *digit == 0 && digit > end + 1 && *status <= 255 ? kind : 0;
}
