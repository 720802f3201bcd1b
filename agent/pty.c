/* PTY and RESIZE. pid 1 keeps a master, so that a terminal outlives the server. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif

/* In the child, leader of its session: hands the master over, makes the terminal its own. The terminal, or -1. */
int terminal_open(const struct plan *p, int channel) {
    static struct report r;
    struct winsize size = {.ws_row = (unsigned short)p->rows, .ws_col = (unsigned short)p->columns};
    int unlock = 0, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) < 0) return -1;
    int fd = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, TIOCSCTTY, 0) < 0 || ioctl(master, TIOCSWINSZ, &size) < 0) return -1;
    if (fcntl(master, F_SETFL, 0) < 0) return -1;
    report_send(channel, &r, &master, 1);
    close(master);
    return fd;
}

/* The same key again: the living terminal's master, handed over once more. */
static void terminal_again(struct slot *s, const struct request *q) {
    if (s->state != RUNNING) {
        answer_error(q->tag, STAGE_DUPLICATE, EEXIST);
    } else if (s->answer.tag) {
        answer_error(q->tag, STAGE_BUSY, EAGAIN);
    } else {
        s->answer.tag = q->tag;
        slot_answer(s, FD, 0);
    }
}

static bool size_valid(const struct request *q) { return q->rows <= UINT16_MAX && q->columns <= UINT16_MAX; }

void handle_pty(const struct request *q, int *fds) {
    struct slot *s = slot_find(q->key);
    if (!size_valid(q)) {
        answer_error(q->tag, STAGE_TERMINAL, EINVAL);
    } else if (s && s->type == TERMINAL) {
        terminal_again(s, q);
    } else if ((s = slot_new(q, TERMINAL))) {
        struct plan p = {.in = -1, .out = -1, .err = -1, .record = fds[0], .commands = -1, .control = -1,
                         .terminal = true, .rows = q->rows, .columns = q->columns};
        spawn_start(s, &p, spawn_report);
    }
}

void handle_resize(const struct request *q) {
    struct slot *s = slot_find(q->key);
    struct winsize size = {.ws_row = (unsigned short)q->rows, .ws_col = (unsigned short)q->columns};
    if (!s || s->type != TERMINAL || s->master < 0 || s->state != RUNNING) answer_error(q->tag, STAGE_LOOKUP, ESRCH);
    else if (!size_valid(q)) answer_error(q->tag, STAGE_TERMINAL, EINVAL);
    else if (ioctl(s->master, TIOCSWINSZ, &size) < 0) answer_error(q->tag, STAGE_TERMINAL, errno);
    else answer_ok(q->tag, 0);
}
