/* SPAWN and reaping: how processes start, and that their end is noticed. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

enum { REAPS_A_TURN = 256 };
enum { REPORT_FD = 3, RECORD_FD = 4, HIGH_FD = 32 }; /* where a child puts its descriptors */

bool reap_again;

/* A pipe; the end that stays here (0 or 1) does not block. */
bool pipe_pair(int pair[2], int ours) {
    if (pipe2(pair, O_CLOEXEC) < 0) return false;
    return fcntl(pair[ours], F_SETFL, O_NONBLOCK) == 0;
}

/* ---- in children ---- */

/* False when pid 1 does not want it any more. */
bool report_send(int fd, const struct report *r, const int *fds, int count) {
    struct iovec part = {(void *)r, sizeof *r};
    union { struct cmsghdr align; char bytes[CMSG_SPACE(FRAME_FDS * sizeof(int))]; } control = {0};
    struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        size_t size = (size_t)count * sizeof(int);
        m.msg_control = &control;
        m.msg_controllen = CMSG_SPACE(size);
        control.align.cmsg_level = SOL_SOCKET;
        control.align.cmsg_type = SCM_RIGHTS;
        control.align.cmsg_len = CMSG_LEN(size);
        memcpy(CMSG_DATA(&control.align), fds, size);
    }
    return sendmsg(fd, &m, MSG_NOSIGNAL) >= 0;
}

static _Noreturn void child_fail(uint32_t stage, int error) {
    static struct report r;
    r.stage = stage;
    r.error = (uint32_t)error;
    report_send(REPORT_FD, &r, NULL, 0);
    _exit(127);
}

/* What pid 1 set up for itself is undone. */
void child_reset(void) {
    /* By system calls: a libc keeps some signals for itself, and leaves those that it found blocked or ignored. */
    const uint64_t none = 0, standard[8] = {0}; /* the kernel's struct sigaction with SIG_DFL, on every machine */
    for (int s = 1; s < 65; s++) syscall(SYS_rt_sigaction, s, standard, NULL, sizeof none);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof none);
    umask(022);
    setrlimit(RLIMIT_NOFILE, &first_limit);
}

void close_range_from(unsigned first, unsigned last) {
#ifdef SYS_close_range
    if (syscall(SYS_close_range, first, last, 0) == 0) return;
#else
    if (syscall(436, first, last, 0) == 0) return;
#endif
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    for (unsigned fd = first; fd <= last && fd < limit.rlim_max; fd++) close((int)fd);
}

/* /dev/null, and truly that: a FIFO in its place must not block. */
int null_open(void) {
    struct stat st;
    int fd = open("/dev/null", O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) return -1;
    if (fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(1, 3) && fcntl(fd, F_SETFL, 0) == 0)
        return fd;
    errno = ENODEV;
    return -1;
}

static void place(int from, int to, int flags) {
    if (from < 0) return;
    if (dup3(from, to, flags) < 0) child_fail(STAGE_EXEC, errno);
}

/* Gives each descriptor its number; nothing of pid 1 stays open, for a copy would hold other commands' pipes. */
static void child_descriptors(struct plan *p, int report) {
    int *all[] = {&report, &p->record, &p->in, &p->out, &p->err, &p->commands, &p->control};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (*all[i] >= 0) *all[i] = fcntl(*all[i], F_DUPFD_CLOEXEC, HIGH_FD);
    if (report < 0 || dup3(report, REPORT_FD, O_CLOEXEC) < 0) _exit(126);
    place(p->record, RECORD_FD, O_CLOEXEC);
    place(p->in, 0, 0);
    place(p->out, 1, 0);
    place(p->err, 2, 0);
    place(p->commands, COMMANDS_FD, 0);
    place(p->control, CONTROL_FD, 0);
    close_range_from(RECORD_FD + 1, COMMANDS_FD - 1);
    close_range_from(p->commands >= 0 ? CONTROL_FD + 1 : COMMANDS_FD, ~0u);
}

/* Standard descriptors that no pipe took: the terminal, or /dev/null. */
static void child_stdio(const struct plan *p) {
    int fd = p->terminal ? terminal_open(p, REPORT_FD) : -1;
    if (fd < 0 && p->terminal) child_fail(STAGE_TERMINAL, errno);
    if (fd < 0 && p->in >= 0 && p->out >= 0) return;
    if (fd < 0 && (fd = null_open()) < 0) child_fail(STAGE_OPEN, errno);
    if (p->in < 0) place(fd, 0, 0);
    if (p->out < 0) place(fd, 1, 0);
    if (p->err < 0) place(fd, 2, 0);
    close(fd);
}

static void child_record(struct record *r) {
    struct stat st;
    if (fstat(RECORD_FD, &st) < 0) child_fail(STAGE_DECODE, errno);
    if (st.st_size <= 0) child_fail(STAGE_DECODE, EINVAL);
    void *bytes = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, RECORD_FD, 0);
    if (bytes == MAP_FAILED) child_fail(STAGE_DECODE, errno);
    int error = record_decode(bytes, (size_t)st.st_size, r);
    if (error) child_fail(STAGE_DECODE, error);
}

/* The script becomes descriptor 9, which `. /dev/fd/9` reads: an argument could not be of any size. A profile may take
 * that for a lock, so it is also there by a high number, where the limit of descriptors allows one. */
static void child_script(const struct record *r) {
    if (!r->script_length) return;
    int fd = memfd_create("script", 0);
    if (fd < 0) child_fail(STAGE_EXEC, errno);
    for (size_t done = 0; done < r->script_length;) {
        ssize_t n = write(fd, r->script + done, r->script_length - done);
        if (n < 0 && errno != EINTR) child_fail(STAGE_EXEC, errno);
        if (n > 0) done += (size_t)n;
    }
    lseek(fd, 0, SEEK_SET);
    if (dup3(fd, SCRIPT_AGAIN_FD, 0) < 0) errno = 0;
    if (fd == SCRIPT_FD) return;
    place(fd, SCRIPT_FD, 0);
    close(fd);
}

/* Adds NAME=value unless the record sets NAME. */
static void child_env(struct record *r, const char *name, const char *value) {
    size_t length = strlen(name);
    for (uint32_t i = 0; i < r->envc; i++)
        if (!strncmp(r->envp[i], name, length) && r->envp[i][length] == '=') return;
    char *entry = malloc(length + strlen(value) + 2);
    if (!entry) child_fail(STAGE_EXEC, ENOMEM);
    strcpy(stpcpy(stpcpy(entry, name), "="), value);
    r->envp[r->envc++] = entry;
    r->envp[r->envc] = NULL;
}

/* The user may open its own pipes again by name, as in `> /dev/stderr`: pid 1 made them as root. */
static void child_own_pipes(const struct plan *p, const struct user *u) {
    const int taken[] = {p->in, p->out, p->err};
    for (int fd = 0; fd < 3; fd++)
        if (taken[fd] >= 0 && fchown(fd, u->uid, u->gid) < 0) child_fail(STAGE_USER, errno);
}

static void child_identity(const struct plan *p, struct record *r, struct user *u) {
    uint32_t stage = STAGE_USER;
    int error = user_find(r->user, u);
    if (error) child_fail(STAGE_USER, error);
    if (p->terminal && fchown(0, u->uid, (gid_t)-1) < 0) child_fail(STAGE_TERMINAL, errno);
    child_own_pipes(p, u);
    if (p->identity) {
        static struct report known;
        known.uid = u->uid;
        known.gid = u->gid;
        report_send(REPORT_FD, &known, NULL, 0);
    }
    if ((error = user_become(u, &stage))) child_fail(stage, error);
}

/* The kernel's out-of-memory killer shall take a command, not pid 1. Best effort: the kernel decides. */
static void child_expendable(void) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd >= 0 && write(fd, "500", 3) == 3) errno = 0;
    if (fd >= 0) close(fd);
}

static _Noreturn void child_start(struct plan *p, int report) {
    static struct user u;
    struct record r;
    child_reset();
    child_descriptors(p, report);
    setsid();
    child_stdio(p);
    child_record(&r);
    child_expendable();
    child_script(&r);
    child_identity(p, &r, &u);
    if (chdir(*r.directory ? r.directory : u.home) < 0) child_fail(STAGE_DIRECTORY, errno);
    child_env(&r, "HOME", u.home);
    if (*u.name) child_env(&r, "USER", u.name);
    if (*u.name) child_env(&r, "LOGNAME", u.name);
    child_env(&r, "SHELL", u.shell);
    environ = r.envp;
    execvp(r.argv[0], r.argv);
    child_fail(STAGE_EXEC, errno);
}

/* ---- in pid 1 ---- */

/* Bytes received, 0 at the end, -1 when there is nothing yet. */
int report_receive(int fd, struct report *out, int *fds, int *count) {
    struct iovec part = {out, sizeof *out};
    union { struct cmsghdr align; char bytes[CMSG_SPACE(FRAME_FDS * sizeof(int))]; } control;
    struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;
    *count = c ? (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;
    if (c) memcpy(fds, CMSG_DATA(c), (size_t)*count * sizeof(int));
    if (n < 0) return errno == EAGAIN || errno == EINTR ? -1 : 0;
    return (int)n;
}

/* Forks the child of a slot. Takes over the plan's descriptors except the record's. False: the request was answered. */
bool spawn_start(struct slot *s, struct plan *p, void (*ready)(struct watch *, uint32_t)) {
    int pair[2] = {-1, -1}, error = 0, stage = STAGE_BUSY;
    pid_t pid = -1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) error = errno;
    s->report.fd = pair[0];
    s->report.ready = ready;
    if (!error && !watch_set(&s->report, EPOLLIN)) error = errno;
    if (!error) {
        pid = fork();
        if (pid == 0) child_start(p, pair[1]);
        if (pid < 0) error = errno, stage = STAGE_FORK;
    }
    int *theirs[] = {&p->in, &p->out, &p->err, &p->commands, &p->control, &pair[1]};
    for (size_t i = 0; i < sizeof theirs / sizeof *theirs; i++) close_fd(theirs[i]);
    if (error) slot_fail(s, (uint32_t)stage, error);
    else s->pid = s->group = pid;
    return !error;
}

static void spawn_started(struct slot *s) {
    watch_close(&s->report);
    s->state = RUNNING;
    if (s->type == TERMINAL && s->master < 0) slot_fail(s, STAGE_TERMINAL, EIO); /* killed before it had one */
    else if (s->type == TERMINAL) slot_answer(s, FD, 0);
    else slot_answer(s, OK, (uint64_t)s->pid);
}

/* The child speaks: that it failed, or what is known before exec. The end of the socket is the exec. */
void spawn_report(struct watch *w, uint32_t events) {
    static struct report r;
    struct slot *s = OWNER(w, struct slot, report);
    (void)events;
    while (w->fd >= 0) {
        int fds[FRAME_FDS], count, n = report_receive(w->fd, &r, fds, &count);
        if (n < 0) return;
        if (n == 0) {
            spawn_started(s);
        } else if (r.stage) {
            slot_fail(s, r.stage, (int)r.error);
        } else {
            s->uid = r.uid;
            s->gid = r.gid;
            for (int i = 0; i < count; i++) {
                close_fd(&s->master);
                s->master = fds[i];
            }
        }
    }
}

void handle_spawn(const struct request *q, int *fds) {
    int out[2] = {-1, -1}, err[2] = {-1, -1}, in[2] = {-1, -1};
    struct slot *s = slot_new(q, EXECUTION);
    if (!s) return;
    bool made = pipe_pair(out, 0) && pipe_pair(err, 0) && (fds[3] < 0 || pipe_pair(in, 1));
    int error = errno;
    stream_start(s, 0, out[0], fds[1], q->cap);
    stream_start(s, 1, err[0], fds[2], q->cap);
    if (fds[3] >= 0) feed_start(s, in[1], fds[3]);
    fds[1] = fds[2] = fds[3] = -1;
    struct plan p = {.in = in[0], .out = out[1], .err = err[1], .record = fds[0], .commands = -1, .control = -1};
    if (made) {
        if (spawn_start(s, &p, spawn_report) && s->in.attached) feed_open(s);
        return;
    }
    close_fd(&p.in);
    close_fd(&p.out);
    close_fd(&p.err);
    slot_fail(s, STAGE_BUSY, error);
}

static struct slot *slot_of_process(pid_t pid) {
    for (int i = 0; i < slots_end; i++)
        if (slots[i] && slots[i]->pid == pid && !slots[i]->dead && !slots[i]->failed) return slots[i];
    return NULL;
}

static void process_ended(pid_t pid, int status) {
    bool killed = WIFSIGNALED(status);
    uint32_t value = (uint32_t)(killed ? WTERMSIG(status) : WEXITSTATUS(status));
    struct slot *s = slot_of_process(pid);
    if (!s) {
        helper_reaped(pid); /* or an orphan of the box, which is nobody's */
        return;
    }
    if (s->state == STARTING) spawn_report(&s->report, 0);
    if (s->failed || s->dead) return;
    s->pid = 0;
    if (s->type == SESSION) shell_died(s, killed, value);
    else slot_ended(s, killed, value);
}

/* A bounded number at once: a box that makes orphans by the thousand does not keep the server waiting. */
void children_reap(void) {
    int status, count = 0;
    for (pid_t pid; count < REAPS_A_TURN && (pid = waitpid(-1, &status, WNOHANG)) > 0; count++)
        process_ended(pid, status);
    reap_again = count == REAPS_A_TURN;
    for (int i = 0; count && i < slots_end; i++)
        if (slots[i] && slots[i]->kill_at) slot_settle(slots[i]);
}
