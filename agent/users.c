/* Users and groups of the box, from its own files. Only ever called in children. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DATABASE_MAX = 16 << 20 };

/* The whole of a regular file as a string, NULL when it is none or too large. Never waits for a FIFO or a lease. */
static char *file_load(const char *path) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size > DATABASE_MAX) return NULL;
    char *text = malloc((size_t)st.st_size + 1);
    size_t length = 0;
    for (ssize_t n = 1; text && n > 0 && length < (size_t)st.st_size; length += n > 0 ? (size_t)n : 0)
        n = read(fd, text + length, (size_t)st.st_size - length);
    close(fd);
    if (text) text[length] = 0;
    return text;
}

/* Splits the next line at colons into `count` fields; false at the end. Missing fields are empty. */
static bool line_next(char **text, char **fields, int count) {
    char *line = strsep(text, "\n");
    if (!line) return false;
    for (int i = 0; i < count; i++) {
        char *field = line ? strsep(&line, ":") : NULL;
        fields[i] = field ? field : "";
    }
    return true;
}

static bool number_parse(const char *text, uint32_t *value) {
    uint64_t n = 0;
    if (!*text) return false;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || (n = n * 10 + (uint64_t)(*text - '0')) >= UINT32_MAX) return false;
    }
    *value = (uint32_t)n;
    return true;
}

static void user_fill(struct user *u, char **fields) {
    text_copy((struct text){fields[0], (uint32_t)strlen(fields[0])}, u->name, sizeof u->name);
    text_copy((struct text){fields[5], (uint32_t)strlen(fields[5])}, u->home, sizeof u->home);
    text_copy((struct text){fields[6], (uint32_t)strlen(fields[6])}, u->shell, sizeof u->shell);
}

/* Looks for a name, or for the uid of `u` when the name is NULL. */
static bool passwd_find(const char *name, struct user *u) {
    char *text = file_load("/etc/passwd"), *fields[7];
    uint32_t uid, gid;
    while (text && line_next(&text, fields, 7)) {
        if (!number_parse(fields[2], &uid) || !number_parse(fields[3], &gid)) continue;
        if (name ? strcmp(fields[0], name) != 0 : uid != u->uid) continue;
        if (name) u->uid = uid, u->gid = gid;
        user_fill(u, fields);
        return true;
    }
    return false;
}

static bool member_of(char *members, const char *name) {
    for (char *member; (member = strsep(&members, ","));)
        if (!strcmp(member, name)) return true;
    return false;
}

static void groups_find(struct user *u) {
    char *text = file_load("/etc/group"), *fields[4];
    uint32_t gid;
    u->groups[u->groups_count++] = u->gid;
    while (text && line_next(&text, fields, 4)) {
        if (u->groups_count == sizeof u->groups / sizeof *u->groups) return;
        if (number_parse(fields[2], &gid) && gid != u->gid && member_of(fields[3], u->name))
            u->groups[u->groups_count++] = gid;
    }
}

/* `who` is a name or "uid:gid". 0, or ENOENT when there is no such user. */
int user_find(const char *who, struct user *u) {
    char copy[256], *rest = copy;
    memset(u, 0, sizeof *u);
    if (!text_copy((struct text){who, (uint32_t)strlen(who)}, copy, sizeof copy)) return ENOENT;
    char *uid = strsep(&rest, ":");
    if (rest) {
        if (!number_parse(uid, &u->uid) || !number_parse(rest, &u->gid)) return ENOENT;
        passwd_find(NULL, u);
        u->groups[u->groups_count++] = u->gid;
    } else {
        if (!*who || !passwd_find(who, u)) return ENOENT;
        groups_find(u);
    }
    if (!*u->home) strcpy(u->home, "/");
    if (!*u->shell) strcpy(u->shell, "/bin/sh");
    return 0;
}

/* 0, or the errno with its stage. */
int user_become(const struct user *u, uint32_t *stage) {
    *stage = STAGE_GROUPS;
    if (setgroups((size_t)u->groups_count, u->groups) < 0) return errno;
    if (setresgid(u->gid, u->gid, u->gid) < 0) return errno;
    *stage = STAGE_USER;
    return setresuid(u->uid, u->uid, u->uid) < 0 ? errno : 0;
}
