/* Makes single system calls and prints the name-free number of the error of each: 0 for success.
 *
 *   probe native|x32|i386 NUMBER[,ARGUMENT...] ...
 *
 * Arguments are numbers; "@" is the address of a zeroed buffer.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static char buffer[4096];

static long number(const char *text)
{
    return text[0] == '@' ? (long)buffer : (long)strtoul(text, NULL, 0);
}

static long i386(const long *a)
{
#ifdef __x86_64__
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(a[0]), "b"(a[1]), "c"(a[2]), "d"(a[3]) : "memory", "r8", "r9", "r10", "r11");
    return (int)result;
#else
    (void)a;
    return -ENOSYS;
#endif
}

int main(int count, char **words)
{
    for (int n = 2; n < count; n++) {
        long a[7] = {0};
        int filled = 0;
        char *part = strtok(words[n], ",");
        for (; part && filled < 7; part = strtok(NULL, ","))
            a[filled++] = number(part);
        pid_t child = fork();
        if (child == 0) {
            if (!strcmp(words[1], "x32"))
                a[0] |= 0x40000000;
            long result;
            if (!strcmp(words[1], "i386"))
                result = i386(a);
            else
                result = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]) < 0 ? -errno : 0;
            printf("%d\n", result < 0 ? (int)-result : 0);
            fflush(stdout);
            _exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) {
            printf("killed by %d\n", WTERMSIG(status));
            fflush(stdout);
        }
    }
    return 0;
}
