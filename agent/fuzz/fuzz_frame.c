/* Fuzz target of everything that decodes bytes: requests, spawn records, a shell's control lines, and the files in
 * which a box keeps its users. The first byte of the input chooses the decoder, the second one the number of
 * descriptors, or whom to look for. */
#include "../frame.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The input stands for /etc/passwd and for /etc/group, without a call of the kernel. */
static const uint8_t *database;
static size_t database_size, database_at;
static void *loaded[4]; /* what children never free is freed after each input */
static size_t loaded_count;

static int open_input(const char *path, int flags) {
    (void)path;
    database_at = 0;
    return flags & O_CLOEXEC ? 100 : -1;
}

static int stat_input(int fd, struct stat *st) {
    memset(st, 0, sizeof *st);
    st->st_mode = S_IFREG;
    st->st_size = (off_t)database_size;
    return fd == 100 ? 0 : -1;
}

static ssize_t read_input(int fd, void *to, size_t size) {
    size_t left = database_size - database_at, count = size < left ? size : left;
    memcpy(to, database + database_at, count);
    database_at += count;
    return fd == 100 ? (ssize_t)count : -1;
}

static int close_input(int fd) { return fd == 100 ? 0 : -1; }
static void *allocate(size_t size) { return loaded[loaded_count++] = malloc(size); }

#define open open_input
#define fstat stat_input
#define read read_input
#define close close_input
#define malloc allocate
#include "../users.c"
#undef malloc
#undef close
#undef read
#undef fstat
#undef open

static volatile unsigned sink;

static void touch(struct text t) {
    for (uint32_t i = 0; i < t.length; i++) sink += (unsigned char)t.bytes[i];
    sink += key_valid(t);
}

static void fuzz_request(const uint8_t *data, size_t size, int descriptors) {
    struct request q;
    char path[PATH_LIMIT];
    if (!request_decode(data, size, descriptors, &q)) return;
    struct text all[] = {q.key, q.shell, q.user, q.path, q.to};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].length) touch(all[i]);
    if (q.path.length && text_copy(q.path, path, sizeof path)) sink += (unsigned)strlen(path);
}

static void fuzz_record(const uint8_t *data, size_t size) {
    struct record r;
    if (record_decode(data, size, &r)) return;
    for (uint32_t i = 0; i < r.argc; i++) sink += (unsigned)strlen(r.argv[i]);
    for (uint32_t i = 0; i < r.envc; i++) sink += (unsigned)strlen(r.envp[i]);
    for (int i = 0; i <= ENV_EXTRA; i++) r.envp[r.envc + (uint32_t)i] = NULL;
    sink += (unsigned)(strlen(r.directory) + strlen(r.user));
    for (size_t i = 0; i < r.script_length; i++) sink += r.script[i];
    free(r.arena);
}

static void fuzz_control(const uint8_t *data, size_t size) {
    char key[KEY_MAX + 1], *line = malloc(size + 1);
    int status;
    if (!line) return;
    memcpy(line, data, size);
    line[size] = 0;
    if (control_decode(line, key, &status)) sink += (unsigned)strlen(key);
    free(line);
}

static void fuzz_users(const uint8_t *data, size_t size, int who) {
    static const char *names[] = {"user", "root", "1000:1000", "0:4294967294", "1:x", ""};
    struct user u;
    database = data;
    database_size = size;
    if (user_find(names[who], &u) == 0) {
        if (u.groups_count < 1 || (size_t)u.groups_count > sizeof u.groups / sizeof *u.groups) abort();
        sink += (unsigned)(strlen(u.name) + strlen(u.home) + strlen(u.shell));
    }
    while (loaded_count) free(loaded[--loaded_count]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    if (data[0] % 4 == 0) fuzz_request(data + 2, size - 2, data[1] % 6);
    if (data[0] % 4 == 1) fuzz_record(data + 2, size - 2);
    if (data[0] % 4 == 2) fuzz_control(data + 2, size - 2);
    if (data[0] % 4 == 3) fuzz_users(data + 2, size - 2, data[1] % 6);
    return 0;
}
