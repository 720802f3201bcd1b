/* SIGNAL and END: which processes a signal reaches, and how a kill is repeated until they have ended. */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { GRACE_MOST = 600000, SEARCH_MS = 30000 };

static bool listed(const struct targets *t, int32_t id) {
    for (uint32_t i = 0; i < t->count; i++)
        if (t->ids[i] == id) return true;
    return false;
}

/* What is known already, or has no room, is left out. */
static void targets_add(struct targets *t, int32_t id) {
    if (t->count < TARGETS_MAX && !listed(t, id)) t->ids[t->count++] = id;
}

/* ---- in children ---- */

struct process {
    pid_t id, parent, group, session;
    bool background; /* it ignores SIGINT and SIGQUIT: so shells without job control begin their background jobs */
};

/* From /proc/ID/stat, whose reader waits for no lock that the process could hold; false when it is gone. */
static bool process_read(const char *name, struct process *p) {
    enum { IGNORED_FIELD = 33 };
    const unsigned long both = 1UL << (SIGINT - 1) | 1UL << (SIGQUIT - 1);
    char path[64], text[2048];
    snprintf(path, sizeof path, "/proc/%.20s/stat", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (n <= 0) return false;
    text[n] = 0;
    char *after = strrchr(text, ')'); /* the name in between may hold anything */
    p->id = atoi(name);
    if (!after || sscanf(after + 1, " %*c %d %d %d", &p->parent, &p->group, &p->session) != 3) return false;
    for (int field = 2; after && field < IGNORED_FIELD; field++) after = strchr(after + 1, ' ');
    p->background = after && (strtoul(after, NULL, 10) & both) == both;
    return true;
}

/* What runs in a shell: the groups of its children's jobs, and each process of its own group, as substitutions are. */
void shell_scan(const struct slot *shell, struct targets *found) {
    struct process p;
    DIR *proc = opendir("/proc");
    for (struct dirent *e; proc && (e = readdir(proc));) {
        if (atoi(e->d_name) <= 1 || !process_read(e->d_name, &p) || p.id == shell->pid || p.group <= 1) continue;
        if (p.group == shell->group) targets_add(found, p.id);
        else if (p.parent == shell->pid) targets_add(found, -p.group);
    }
    if (proc) closedir(proc);
}

/* The shell first: one that sees its child die would go on to what the command does next. */
static void signal_shell(const struct slot *s, int signal, struct targets *reached) {
    static struct targets all;
    shell_scan(s->shell, &all);
    kill(s->shell->pid, signal);
    for (uint32_t i = 0; i < all.count; i++)
        if (!listed(&s->earlier, all.ids[i])) targets_add(reached, all.ids[i]);
    for (uint32_t i = 0; i < reached->count; i++) kill(reached->ids[i], signal);
}

struct tree {
    uint32_t count;
    struct process processes[TARGETS_MAX];
};

static bool tree_has(const struct tree *t, pid_t id) {
    for (uint32_t i = 0; i < t->count; i++)
        if (t->processes[i].id == id) return true;
    return false;
}

static void tree_root(struct tree *t, pid_t id) {
    char name[16];
    snprintf(name, sizeof name, "%d", id);
    if (id > 1 && t->count < TARGETS_MAX && process_read(name, &t->processes[t->count])) t->count++;
}

/* A descendant in the session of the command, parents first. A background job is none, nor is what it has begun. */
static bool tree_grow(struct tree *t, DIR *proc, pid_t session) {
    uint32_t before = t->count;
    struct process p;
    rewinddir(proc);
    for (struct dirent *e; t->count < TARGETS_MAX && (e = readdir(proc));) {
        if (atoi(e->d_name) <= 1 || !process_read(e->d_name, &p) || p.session != session) continue;
        if (!p.background && tree_has(t, p.parent) && !tree_has(t, p.id)) t->processes[t->count++] = p;
    }
    return t->count > before;
}

/* The launched process first, then its descendants, and those of processes that an earlier signal has reached. */
static void signal_command(const struct slot *s, const struct request *q, struct targets *reached) {
    static struct tree tree;
    DIR *proc = opendir("/proc");
    tree_root(&tree, s->pid);
    for (uint32_t i = 0; i < s->ending.count; i++) tree_root(&tree, s->ending.ids[i]);
    while (proc && tree_grow(&tree, proc, s->group)) continue;
    bool whole = q->scope == SCOPE_GROUP && kill(-s->group, (int)q->signal) == 0;
    for (uint32_t i = 0; i < tree.count; i++) {
        const struct process *p = &tree.processes[i];
        if (whole && p->group == s->group) continue; /* it has it already */
        if (kill(p->id, (int)q->signal) == 0) targets_add(reached, p->id);
    }
    for (uint32_t i = 0; i < s->ending.count && q->signal == SIGKILL; i++) kill(s->ending.ids[i], SIGKILL);
}

static void signal_body(const struct request *q, int channel, int unused) {
    static struct report r;
    const struct slot *s = slot_find(q->key);
    (void)unused;
    if (s->type == COMMAND) signal_shell(s, (int)q->signal, &r.u.targets);
    else signal_command(s, q, &r.u.targets);
    report_send(channel, &r, NULL, 0);
}

/* ---- in pid 1 ---- */

static bool shell_lives(const struct slot *s) { return s->shell && s->shell->pid && s->state == RUNNING; }

/* After the end of the leader its group is still reached, as long as the agent knows the execution. */
static int signal_slot(const struct slot *s, uint32_t scope, int signal) {
    if (scope == SCOPE_GROUP && kill(-s->group, signal) == 0) return 0;
    if (!s->pid) return ESRCH;
    return kill(s->pid, signal) < 0 ? errno : 0;
}

/* kill(-1) reaches everybody only from pid 1 of a pid namespace: elsewhere it would be a disaster. */
static int signal_all(int signal) {
    if (getpid() != 1) return EPERM;
    return kill(-1, signal) < 0 && errno != ESRCH ? errno : 0;
}

void handle_signal(const struct request *q) {
    struct slot *s = q->scope == SCOPE_ALL ? NULL : slot_find(q->key);
    bool command = s && s->type == COMMAND;
    int error = command && !shell_lives(s) ? ESRCH : q->signal > 64 || q->scope > SCOPE_ALL ? EINVAL : 0;
    if (!error && command) {
        helper_start(q, q->tag, SEARCH_MS, signal_body, -1);
        return;
    }
    if (!error && q->scope == SCOPE_ALL) error = signal_all((int)q->signal);
    else if (!error) error = s ? signal_slot(s, q->scope, (int)q->signal) : ESRCH;
    if (error) answer_error(q->tag, STAGE_LOOKUP, error);
    else answer_ok(q->tag, 0);
}

static void end_told(struct helper *h, const struct report *r, int *fds) {
    struct slot *s = slot_numbered(h->serial);
    (void)fds;
    if (!s) return;
    s->searching = false;
    for (uint32_t i = 0; s->kill_at && !r->stage && i < r->u.targets.count; i++)
        targets_add(&s->ending, r->u.targets.ids[i]);
    slot_settle(s);
}

/* Begins a helper that signals all processes of a command; its report says which. False: no helper can be made. */
static bool end_search(struct slot *s, uint32_t scope, int signal) {
    struct request q = {.key = {s->key, (uint32_t)strlen(s->key)}, .scope = scope, .signal = (uint32_t)signal};
    struct helper *h = helper_start(&q, 0, SEARCH_MS, signal_body, -1);
    if (h) h->serial = s->serial, h->done = end_told, s->searching = true;
    return h != NULL;
}

/* Whether a process that END has signalled is still there, or is being looked for: EXIT waits until none is. */
bool end_lasts(const struct slot *s) {
    if (s->kill_at && s->searching) return true;
    for (uint32_t i = 0; s->kill_at && i < s->ending.count; i++)
        if (kill(s->ending.ids[i], 0) == 0) return true;
    return false;
}

/* Each RETRY_MS, also without a server. Who is gone is forgotten: another may get that number later. */
void end_continue(struct slot *s) {
    bool due = now_ms() >= s->kill_at, lives = s->type == COMMAND ? shell_lives(s) : s->pid || s->ending.count;
    struct targets *t = &s->ending;
    uint32_t left = 0;
    if (due && lives && !s->insisted && end_search(s, SCOPE_PROCESS, SIGKILL)) { /* what it has begun since, too */
        s->insisted = true;
        s->kill_at = now_ms() + RETRY_MS;
        due = false;
    }
    for (uint32_t i = 0; i < t->count; i++)
        if (kill(t->ids[i], due ? SIGKILL : 0) == 0) t->ids[left++] = t->ids[i];
    t->count = left;
    if (due && (s->insisted || !lives)) {
        s->kill_at = t->count = 0;
        s->insisted = false;
    } else {
        retry_later();
    }
    slot_settle(s);
}

/* SIGTERM, and SIGKILL after a grace, which runs from the first END on. Where no helper is to be had the process, or
 * its group, is signalled alone. It is answered at once: no server needs to stay until the helper is done. */
void handle_end(const struct request *q) {
    struct slot *s = slot_find(q->key);
    bool command = s && s->type == COMMAND, searched = false;
    int error = !s ? ESRCH : q->scope > SCOPE_GROUP ? EINVAL : 0;
    uint32_t stage = STAGE_LOOKUP;
    if (!error && command && !shell_lives(s)) error = ESRCH;
    if (!error && (command || (s->type == EXECUTION && s->pid))) searched = end_search(s, q->scope, SIGTERM);
    if (!error && command && !searched) error = errno, stage = error == EAGAIN ? STAGE_BUSY : STAGE_FORK;
    if (!error && !searched) error = signal_slot(s, q->scope, SIGTERM);
    if (error) {
        answer_error(q->tag, stage, error);
        return;
    }
    if (!command) targets_add(&s->ending, q->scope == SCOPE_GROUP ? -s->group : s->pid);
    if (!s->kill_at) s->kill_at = now_ms() + (q->deadline > GRACE_MOST ? GRACE_MOST : q->deadline);
    retry_later();
    answer_ok(q->tag, 0);
}
