/* SHELL and RUN: a living shell, and commands inside it. The shell gets each command's FIFOs by a folder. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <unistd.h>

#define FOLDERS "/run/devboxd/x"
#define RECORDS "/run/devboxd/s"

enum { HELPER_MS = 30000, NOT_RUN = 126 };

static void command_ended(struct slot *s, uint32_t how, uint32_t value) {
    if (s->shell) s->shell->running = NULL;
    s->shell = NULL;
    slot_ended(s, how, value);
    folder_remove(s);
}

static void line_handle(struct slot *shell, const char *line) {
    char key[KEY_MAX + 1];
    int status;
    char kind = control_decode(line, key, &status);
    struct slot *s = shell->running;
    if (!kind || !s || s->state != RUNNING || strcmp(s->key, key) != 0) return;
    if (kind == 'S') s->begun = true;
    if (kind == 'S' && s->in.attached) feed_open(s);
    if (kind == 'E') command_ended(s, 0, (uint32_t)status);
}

/* One read a turn. A line that is too long is no message of ours: what is over is dropped. */
static bool control_read(struct slot *s) {
    uint32_t room = sizeof s->line - 1 - s->line_length;
    ssize_t n = read(s->control.fd, s->line + s->line_length, room);
    if (n < 0 && errno == EINTR) return true;
    if (n == 0) watch_close(&s->control);
    if (n <= 0) return false;
    s->line_length += (uint32_t)n;
    char *start = s->line, *end = s->line + s->line_length, *newline;
    while ((newline = memchr(start, '\n', (size_t)(end - start)))) {
        *newline = 0;
        line_handle(s, start);
        start = newline + 1;
    }
    s->line_length = (uint32_t)(end - start);
    memmove(s->line, start, s->line_length);
    if (s->line_length == sizeof s->line - 1) s->line_length = 0;
    return true;
}

void control_ready(struct watch *w, uint32_t events) {
    (void)events;
    control_read(OWNER(w, struct slot, control));
}

void handle_shell(const struct request *q, int *fds) {
    int commands[2] = {-1, -1}, control[2] = {-1, -1};
    struct slot *s = slot_new(q, SESSION);
    if (!s) return;
    bool made = pipe_pair(commands, 1) && pipe_pair(control, 0);
    int error = errno;
    struct plan p = {.in = -1, .out = -1, .err = -1, .record = fds[0], .commands = commands[0], .control = control[1],
                     .identity = true};
    s->commands = commands[1];
    s->control.fd = control[0];
    s->control.ready = control_ready;
    if (made && watch_set(&s->control, EPOLLIN)) {
        spawn_start(s, &p, spawn_report);
        return;
    }
    close_fd(&p.commands);
    close_fd(&p.control);
    slot_fail(s, STAGE_BUSY, error);
}

/* What the shell still said counts: the command may have ended before it. */
void shell_died(struct slot *s, uint32_t how, uint32_t value) {
    for (int i = 0; i < CHUNK / 128 && s->control.fd >= 0 && control_read(s); i++) continue;
    struct slot *command = s->running;
    if (!command) {
        slot_ended(s, how, value);
        return;
    }
    s->running = command->shell = NULL;
    slot_drop(s);
    if (command->state == STARTING) {
        slot_fail(command, STAGE_LOOKUP, ESRCH);
        folder_remove(command);
        return;
    }
    command->flags |= EXIT_SHELL_DIED;
    if (!command->begun && how == 0 && value == 0) value = NOT_RUN; /* nothing that was not run has succeeded */
    command_ended(command, how, value);
}

/* ---- in children ---- */

static _Noreturn void finish(int channel, uint32_t stage, int error) {
    static struct report r;
    r.stage = stage;
    r.error = (uint32_t)error;
    report_send(channel, &r, NULL, 0);
    _exit(0);
}

static void text_write(int folder, int from, const struct slot *shell, int channel) {
    int fd = openat(folder, "c", O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0 || fchown(fd, shell->uid, shell->gid) < 0) finish(channel, STAGE_OPEN, errno);
    lseek(from, 0, SEEK_SET);
    for (ssize_t n; (n = read(from, buffer, CHUNK)) != 0;) {
        if (n < 0) finish(channel, STAGE_OPEN, errno);
        for (ssize_t done = 0, w; done < n; done += w)
            if ((w = write(fd, buffer + done, (size_t)(n - done))) < 0) finish(channel, STAGE_OPEN, errno);
    }
    close(fd);
}

/* A FIFO and our end of it, which does not block. A writer needs a reader at its open, so one stands in; a reader must
 * not see a writer come and go, for that is an end of file. */
static int fifo_make(int folder, const char *name, bool ours_writes, const struct slot *shell) {
    struct stat st;
    int flags = O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
    if (mkfifoat(folder, name, 0600) < 0) return -1;
    int both = ours_writes ? openat(folder, name, O_RDWR | flags) : -1;
    int fd = openat(folder, name, (ours_writes ? O_WRONLY : O_RDONLY) | flags);
    if (both >= 0) close(both);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISFIFO(st.st_mode) || fchown(fd, shell->uid, shell->gid) < 0) return -1;
    return fd;
}

static void folder_path(struct text key, char *path, size_t size) {
    snprintf(path, size, FOLDERS "/%.*s", (int)key.length, key.bytes);
}

static void folder_clear(const char *folder) {
    char path[160];
    for (const char *name = "012c"; *name; name++) {
        snprintf(path, sizeof path, "%s/%c", folder, *name);
        unlink(path);
    }
    rmdir(folder);
}

static void run_body(const struct request *q, int channel, int text) {
    static struct report r;
    char path[128];
    const struct slot *s = slot_find(q->key), *shell = s->shell;
    umask(0);
    mkdir("/run/devboxd", 0755);
    mkdir(FOLDERS, 0711);
    mkdir(RECORDS, 0711);
    snprintf(path, sizeof path, RECORDS "/%s", shell->key);
    if (mkdir(path, 0700) == 0 && lchown(path, shell->uid, shell->gid) < 0) finish(channel, STAGE_OPEN, errno);
    folder_path(q->key, path, sizeof path);
    folder_clear(path); /* a shell that has died may have left one of this key */
    if (mkdir(path, 0700) < 0) finish(channel, STAGE_OPEN, errno);
    int folder = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), fds[3], count = 2;
    if (folder < 0) finish(channel, STAGE_OPEN, errno);
    text_write(folder, text, shell, channel);
    fds[0] = fifo_make(folder, "1", false, shell);
    fds[1] = fifo_make(folder, "2", false, shell);
    if (q->flags & FLAG_STDIN) fds[count++] = fifo_make(folder, "0", true, shell);
    for (int i = 0; i < count; i++)
        if (fds[i] < 0) finish(channel, STAGE_OPEN, errno ? errno : EINVAL);
    if (fchown(folder, shell->uid, shell->gid) < 0) finish(channel, STAGE_OPEN, errno);
    shell_scan(shell, &r.u.targets);
    report_send(channel, &r, fds, count);
}

static void remove_body(const struct request *q, int channel, int unused) {
    char path[128];
    (void)unused;
    folder_path(q->key, path, sizeof path);
    folder_clear(path);
    finish(channel, STAGE_NONE, 0);
}

/* ---- in pid 1 ---- */

static void folder_removed(struct helper *h, const struct report *r, int *fds) {
    struct slot *s = slot_numbered(h->serial);
    (void)fds;
    if (!s) return;
    s->removing = false;
    s->folder = r->stage != 0;
    if (s->folder) retry_later();
    slot_settle(s);
}

/* At the end of a command; tried again when there is no helper to be had. */
void folder_remove(struct slot *s) {
    struct request q = {.key = {s->key, (uint32_t)strlen(s->key)}};
    if (!s->folder || s->removing || s->dead) return;
    struct helper *h = helper_start(&q, 0, HELPER_MS, remove_body, -1);
    if (!h) {
        retry_later();
        return;
    }
    h->serial = s->serial;
    h->done = folder_removed;
    s->removing = true;
}

/* The folder is ready: the shell is told. */
static void run_done(struct helper *h, const struct report *r, int *fds) {
    struct slot *s = slot_numbered(h->serial);
    char line[KEY_MAX + 2];
    if (!s || s->failed || s->type != COMMAND || s->state != STARTING) return;
    if (r->stage) {
        slot_fail(s, r->stage, (int)r->error);
        folder_remove(s);
        return;
    }
    s->earlier = r->u.targets;
    stream_start(s, 0, fds[0], s->out[0].journal, s->out[0].cap);
    stream_start(s, 1, fds[1], s->out[1].journal, s->out[1].cap);
    if (s->in.attached) feed_start(s, fds[2], s->in.spool);
    else close_fd(&fds[2]);
    fds[0] = fds[1] = fds[2] = -1;
    int length = snprintf(line, sizeof line, "%s\n", s->key);
    if (write(s->shell->commands, line, (size_t)length) == length) {
        s->state = RUNNING;
        slot_answer(s, OK, 0);
    } else {
        slot_fail(s, errno == EPIPE ? STAGE_LOOKUP : STAGE_BUSY, errno == EPIPE ? ESRCH : errno);
        folder_remove(s);
    }
}

void handle_run(const struct request *q, int *fds) {
    struct slot *shell = slot_find(q->shell), *s;
    if (!shell || shell->type != SESSION || shell->state != RUNNING) {
        answer_error(q->tag, STAGE_LOOKUP, ESRCH);
    } else if (shell->running) {
        answer_error(q->tag, STAGE_BUSY, EBUSY);
    } else if ((s = slot_new(q, COMMAND))) {
        strcpy(s->shell_key, shell->key);
        s->shell = shell;
        shell->running = s;
        for (int i = 0; i < 2; i++) s->out[i].journal = fds[1 + i], s->out[i].cap = q->cap;
        s->in.spool = fds[3];
        s->in.attached = fds[3] >= 0;
        fds[1] = fds[2] = fds[3] = -1;
        struct helper *h = helper_start(q, 0, HELPER_MS, run_body, fds[0]);
        s->folder = h != NULL;
        if (h) h->serial = s->serial, h->done = run_done;
        else slot_fail(s, errno == EAGAIN ? STAGE_BUSY : STAGE_FORK, errno);
    }
}
