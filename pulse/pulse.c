/* devboxd-pulse GROUP: wakes up on each processor a thousand times a second, until its standard input ends.
 *
 * A kernel asks who shall run when somebody wakes up, and else at its tick, every 4 ms with most of them. A process that
 * has just had its turn waits for that long behind one that is idle beside it. GROUP is the file with the processes of the
 * group at the root, in which this one is beside all others; where that refuses, it stays where it is. */
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void beat(int processor) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0) _exit(1);
    const struct timespec pause = {.tv_nsec = 1000000};
    for (;;) clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
}

int main(int count, char **words) {
    cpu_set_t allowed;
    if (count != 2 || sched_getaffinity(0, sizeof allowed, &allowed) < 0) return 2;
    int group = open(words[1], O_WRONLY | O_CLOEXEC);
    if (group >= 0) {
        ssize_t ignored = write(group, "0", 1);
        (void)ignored;
        close(group);
    }
    setpriority(PRIO_PROCESS, 0, -20);
    setpgid(0, 0); /* what a terminal sends to the server is not meant for this one, which ends with it */
    pid_t self = getpid();
    pid_t children[CPU_SETSIZE];
    int started = 0;
    for (int processor = 0; processor < CPU_SETSIZE; processor++) {
        if (!CPU_ISSET(processor, &allowed)) continue;
        pid_t child = fork();
        if (child < 0) return 1;
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != self) _exit(0);
            beat(processor);
        }
        children[started++] = child;
    }
    char byte;
    while (read(STDIN_FILENO, &byte, 1) > 0) continue;
    while (started > 0) kill(children[--started], SIGKILL);
    while (wait(NULL) > 0) continue;
    return 0;
}
