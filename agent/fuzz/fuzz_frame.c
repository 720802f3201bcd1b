/* Fuzz target of everything that decodes bytes: requests, spawn records, a shell's control lines. The first byte of the
 * input chooses the decoder, the second one the number of descriptors. */
#include "../frame.h"

#include <stdlib.h>
#include <string.h>

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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    if (data[0] % 3 == 0) fuzz_request(data + 2, size - 2, data[1] % 6);
    if (data[0] % 3 == 1) fuzz_record(data + 2, size - 2);
    if (data[0] % 3 == 2) fuzz_control(data + 2, size - 2);
    return 0;
}
