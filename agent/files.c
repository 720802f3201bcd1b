/* READ, WRITE, RENAME, UNLINK: the child opens the box's files as the user and hands the descriptor over. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { CHANNEL_FD = 3, LINKS_MAX = 40, WAIT_SECONDS = 60 };
enum { OPEN_FLAGS = O_NONBLOCK | O_NOCTTY | O_CLOEXEC };

static struct report report;

static _Noreturn void finish(uint32_t stage, int error) {
    report.stage = stage;
    report.error = (uint32_t)error;
    report_send(CHANNEL_FD, &report, NULL, 0);
    _exit(0);
}

/* A path as the user means it: absolute, "~/..." or relative to the home. */
static void path_expand(struct text path, const char *home, char *out) {
    char raw[PATH_LIMIT];
    if (memchr(path.bytes, 0, path.length)) finish(STAGE_DECODE, EINVAL);
    if (!text_copy(path, raw, sizeof raw)) finish(STAGE_OPEN, ENAMETOOLONG);
    if (!*raw) finish(STAGE_OPEN, ENOENT);
    const char *rest = raw[0] != '~' || (raw[1] && raw[1] != '/') ? raw : raw[1] ? raw + 2 : "";
    int n = *raw == '/' ? snprintf(out, PATH_LIMIT, "%s", raw) : snprintf(out, PATH_LIMIT, "%s/%s", home, rest);
    if (n >= PATH_LIMIT) finish(STAGE_OPEN, ENAMETOOLONG);
}

/* Whether the server may use the file itself. procfs and its like judge whoever reads, others may block it. */
static bool plain_disk(int fd) {
    struct statfs fs;
    if (fstatfs(fd, &fs) < 0) return false;
    switch ((uint32_t)fs.f_type) {
    case 0x794c7630: case 0x01021994: case 0xEF53: case 0x9123683E: case 0x58465342: /* overlay tmpfs ext4 btrfs xfs */
        return true;
    default: return false;
    }
}

static void regular_only(const struct stat *st) {
    if (S_ISDIR(st->st_mode)) finish(STAGE_TYPE, EISDIR);
    if (!S_ISREG(st->st_mode)) finish(STAGE_TYPE, EINVAL);
}

static bool write_all(int fd, const uint8_t *bytes, ssize_t count) {
    while (count > 0) {
        ssize_t n = write(fd, bytes, (size_t)count);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        bytes += n;
        count -= n;
    }
    return true;
}

/* Hands one end of a pipe over and serves the other until either side ends. A file that blocks for a minute ends it. */
static _Noreturn void serve(int file, bool reading) {
    int pair[2];
    if (pipe2(pair, O_CLOEXEC) < 0) finish(STAGE_OPEN, errno);
    report.kind = 1;
    if (!report_send(CHANNEL_FD, &report, &pair[reading ? 0 : 1], 1)) _exit(0);
    close(pair[reading ? 0 : 1]);
    fcntl(file, F_SETFL, reading ? 0 : O_WRONLY);
    for (;;) {
        alarm(reading ? WAIT_SECONDS : 0);
        ssize_t n = read(reading ? file : pair[0], buffer, CHUNK);
        if (n <= 0) _exit(0);
        alarm(reading ? 0 : WAIT_SECONDS);
        if (!write_all(reading ? pair[1] : file, buffer, n)) _exit(0);
    }
}

static void read_file(const char *path) {
    struct stat st;
    if (stat(path, &st) < 0) finish(STAGE_OPEN, errno);
    regular_only(&st); /* before open, which could have an effect on a device */
    int fd = open(path, O_RDONLY | OPEN_FLAGS);
    if (fd < 0) finish(STAGE_OPEN, errno);
    if (fstat(fd, &st) < 0) finish(STAGE_OPEN, errno);
    regular_only(&st);
    if (!plain_disk(fd)) serve(fd, true);
    report_send(CHANNEL_FD, &report, &fd, 1);
}

/* Makes the folders above `path`. */
static void parents_make(char *path) {
    struct stat st;
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        if (mkdir(path, 0755) < 0) {
            int error = errno;
            if (stat(path, &st) < 0) finish(STAGE_PARENTS, error == EEXIST ? errno : error);
            if (!S_ISDIR(st.st_mode)) finish(STAGE_PARENTS, ENOTDIR);
        }
        *slash = '/';
    }
}

/* Replaces a path that is a symbolic link to nothing by what it points to; false when it is no link. */
static bool link_follow(char *path) {
    char target[PATH_LIMIT], *slash = strrchr(path, '/');
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n < 0) return false;
    target[n] = 0;
    if (*target == '/') slash = path;
    else slash++;
    if ((size_t)(slash - path) + (size_t)n >= PATH_LIMIT) finish(STAGE_OPEN, ENAMETOOLONG);
    strcpy(slash, target);
    return true;
}

/* Resolves `path` into the report's target, makes its parents; true (and st) when the target exists. */
static bool target_resolve(char *path, struct stat *st) {
    char *target = report.u.paths.target, folder[PATH_LIMIT];
    for (int links = 0; stat(path, st) < 0; links++) {
        if (errno != ENOENT) finish(errno == ENOTDIR ? STAGE_PARENTS : STAGE_OPEN, errno);
        if (links == LINKS_MAX) finish(STAGE_OPEN, ELOOP);
        parents_make(path);
        if (link_follow(path)) continue;
        if (stat(path, st) == 0) break;
        char *slash = strrchr(path, '/');
        if (!slash[1]) finish(STAGE_TYPE, EISDIR);
        memcpy(folder, path, (size_t)(slash - path) + 1);
        folder[slash - path + 1] = 0;
        if (!realpath(folder, target)) finish(STAGE_PARENTS, errno);
        size_t length = strlen(target);
        if (length + strlen(slash) >= PATH_LIMIT) finish(STAGE_OPEN, ENAMETOOLONG);
        strcpy(target + length, length == 1 ? slash + 1 : slash);
        return false;
    }
    regular_only(st);
    if (!realpath(path, target)) finish(STAGE_OPEN, errno);
    if (access(target, W_OK) < 0) finish(STAGE_OPEN, errno);
    return true;
}

/* A new file beside the target, under a name that nobody guesses. */
static int temporary_make(void) {
    char *path = report.u.paths.temporary;
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != sizeof random) finish(STAGE_OPEN, EIO);
    strcpy(path, report.u.paths.target);
    char *name = strrchr(path, '/') + 1;
    if ((size_t)(name - path) + 32 > PATH_LIMIT) finish(STAGE_OPEN, ENAMETOOLONG);
    sprintf(name, ".devboxd-%016llx", (unsigned long long)random);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | OPEN_FLAGS, 0600);
    if (fd < 0) finish(STAGE_OPEN, errno);
    return fd;
}

static _Noreturn void write_served(int fd) {
    memset(&report.u, 0, sizeof report.u);
    if (ftruncate(fd, 0) < 0) errno = 0; /* procfs and sysfs have no length */
    serve(fd, false);
}

/* Whether a new file by us can have the target's owner and group. */
static bool ownable(const struct stat *target) {
    gid_t groups[256];
    if (!geteuid()) return true;
    if (target->st_uid != geteuid()) return false;
    if (target->st_gid == getegid()) return true;
    int count = getgroups(sizeof groups / sizeof *groups, groups);
    for (int i = 0; i < count; i++)
        if (groups[i] == target->st_gid) return true;
    return false;
}

/* Whether a new file can take the target's place: as the same owner's, and the folder must allow it. */
static bool replaceable(const struct stat *target) {
    char folder[PATH_LIMIT];
    strcpy(folder, report.u.paths.target);
    strrchr(folder, '/')[1] = 0;
    return ownable(target) && access(folder, W_OK | X_OK) == 0;
}

/* Hands the target itself over, emptied: it may be written, but nothing may be put in its place. */
static _Noreturn void write_in_place(int fd) {
    memset(&report.u, 0, sizeof report.u);
    if (ftruncate(fd, 0) < 0) finish(STAGE_OPEN, errno);
    report_send(CHANNEL_FD, &report, &fd, 1);
    _exit(0);
}

/* Writes an existing target itself where it must be; returns when a new file shall replace it. Only what is written is
 * opened for writing: a program that runs may be replaced, but not written. */
static void write_existing(const struct stat *st) {
    int fd = open(report.u.paths.target, O_PATH | O_CLOEXEC);
    if (fd < 0) finish(STAGE_OPEN, errno);
    bool plain = plain_disk(fd);
    close(fd);
    if (plain && replaceable(st)) return;
    fd = open(report.u.paths.target, O_WRONLY | OPEN_FLAGS);
    if (fd < 0) finish(STAGE_OPEN, errno);
    if (!plain) write_served(fd); /* the server must not touch it */
    write_in_place(fd);
}

static void write_file(char *path, uint32_t mode) {
    struct stat st;
    bool exists = target_resolve(path, &st);
    if (exists) write_existing(&st);
    int fd = temporary_make();
    if (!exists && !plain_disk(fd)) {
        unlink(report.u.paths.temporary);
        fd = open(report.u.paths.target, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | OPEN_FLAGS, mode & 07777);
        if (fd < 0) finish(STAGE_OPEN, errno);
        write_served(fd);
    }
    int error = exists && fchown(fd, st.st_uid, st.st_gid) < 0 ? errno : 0;
    if (!error && fchmod(fd, (exists ? st.st_mode : mode) & 07777) < 0) error = errno;
    if (error) {
        unlink(report.u.paths.temporary);
        finish(STAGE_OPEN, error);
    }
    char told;
    bool delivered = report_send(CHANNEL_FD, &report, &fd, 1);
    close(fd); /* who executes the file must not find it open for writing */
    if (!delivered || recv(CHANNEL_FD, &told, 1, 0) != 1) unlink(report.u.paths.temporary);
}

static void files_body(const struct request *q, int channel, int unused) {
    static struct user u;
    char who[256], path[PATH_LIMIT], to[PATH_LIMIT];
    uint32_t stage = STAGE_USER;
    (void)channel, (void)unused;
    int error = text_copy(q->user, who, sizeof who) ? user_find(who, &u) : ENOENT;
    if (error || (error = user_become(&u, &stage))) finish(stage, error);
    path_expand(q->path, u.home, path);
    if (q->verb == READ) read_file(path);
    if (q->verb == WRITE) write_file(path, q->mode);
    if (q->verb == UNLINK && unlink(path) < 0) finish(STAGE_OPEN, errno);
    if (q->verb == UNLINK) finish(STAGE_NONE, 0);
    if (q->verb != RENAME) return;
    path_expand(q->to, u.home, to);
    if (rename(path, to) < 0) finish(STAGE_RENAME, errno);
    finish(STAGE_NONE, 0);
}

void handle_files(const struct request *q) {
    if (q->verb == RENAME || q->verb == UNLINK) helpers_release(q->path);
    helper_start(q, q->tag, q->deadline, files_body, -1);
}
